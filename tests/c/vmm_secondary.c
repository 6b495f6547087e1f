/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_secondary.c -- a complete secondary in C: somebody's VMM (vmm_guest.h: KVM, two RAM blocks, one vCPU) with libcolocache in it.
 *
 *     vmm_secondary SOCKET [bounded]      listens on a Unix socket for `colocache primary unix:SOCKET`; in which memory mode
 *
 * It keeps in step with a primary written in Python, is killed off its primary by the test, takes over and runs on.  Every
 * page is checked after each flush (against the primary's hashes), at the takeover and after having run on (against the
 * guest's history).  One JSON object a line on stdout; exit status 0 only if it took over and no page was ever wrong.
 *
 * The messages are those of colocache/replication/messages.py.  Where a step follows from a promise of the library, the
 * comment says so: this file is also the example that colocache.h points to.
 */
#define _GNU_SOURCE
#include <colocache.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "vmm_guest.h"

enum message {
    CHECKPOINT_READY = 0,
    CHECKPOINT_REQUEST = 1,
    CHECKPOINT_REPLY = 2,
    VMSTATE_SEND = 3,
    VMSTATE_SIZE = 4,
    VMSTATE_RECEIVED = 5,
    VMSTATE_LOADED = 6,
    HELLO = 0x101,
    ABORT = 0x102,
    PING = 0x103,
    PONG = 0x104,
    OUTPUT = 0x106,
    INPUT = 0x107,
};
enum abort_kind { ABORT_CHECKPOINT = 1, ABORT_LOAD = 4, ABORT_END = 5 };

#define PEER_TIMEOUT_MS 10000
#define HELLO_BYTES_MAX 65536u
#define CONVERSATION_VERSION 7 /* of colocache/replication/messages.py */
#define CHECKPOINT_GIVEN_UP 1  /* the primary gave up this epoch; the session goes on */

struct header {
    uint32_t type, a, b;
    uint64_t epoch, body_len;
};

struct vmm {
    int socket;
    struct colocache *cache;
    struct colocache_source *log;
    struct guest guest;
    bool bounded; /* memory: the guest's mapping is private, its log says nothing, and the cache takes no memory yet */
    bool can_run; /* memory and device state are of one epoch */
    uint64_t checkpoints, svm_pages, checked_pages, wrong_pages;
};

/* trouble -- a failed call of the library, said once; hands the code on */
static int trouble(const char *what, int code)
{
    fprintf(stderr, "vmm_secondary: %s: %s (%d)\n", what, colocache_last_error(), code);
    return code;
}

/* ---- the connection -------------------------------------------------------------------------------------------- */

static int send_message(const struct vmm *vmm, uint32_t type, uint64_t epoch, uint32_t a, const void *body, uint64_t body_len)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    colocache_message_header(header, type, epoch, body_len, a, 0);
    const void *parts[] = {header, body};
    uint64_t lengths[] = {sizeof header, body_len};
    for (int i = 0; i < 2; i++) {
        for (uint64_t done = 0; done < lengths[i];) {
            ssize_t n = send(vmm->socket, (const char *)parts[i] + done, lengths[i] - done, MSG_NOSIGNAL);
            if (n <= 0 && errno != EINTR)
                return COLOCACHE_E_PEER_LOST;
            done += n > 0 ? (uint64_t)n : 0;
        }
    }
    return 0;
}

static int receive_bytes(const struct vmm *vmm, void *into, uint64_t n_bytes)
{
    for (uint64_t done = 0; done < n_bytes;) {
        struct pollfd wait = {.fd = vmm->socket, .events = POLLIN};
        if (poll(&wait, 1, PEER_TIMEOUT_MS) == 0)
            return COLOCACHE_E_TIMEOUT;
        ssize_t n = recv(vmm->socket, (char *)into + done, n_bytes - done, 0);
        if (n == 0 || (n < 0 && errno != EINTR))
            return COLOCACHE_E_PEER_LOST;
        done += n > 0 ? (uint64_t)n : 0;
    }
    return 0;
}

static int skip(const struct vmm *vmm, uint64_t n_bytes)
{
    char dropped[4096];
    int rc = 0;
    for (uint64_t n; rc == 0 && n_bytes; n_bytes -= n) {
        n = n_bytes < sizeof dropped ? n_bytes : sizeof dropped;
        rc = receive_bytes(vmm, dropped, n);
    }
    return rc;
}

/* next_message -- pages of `epoch` (0: any) go to the cache; PING is answered here; comes back with anything else */
static int next_message(struct vmm *vmm, uint64_t epoch, struct header *out)
{
    for (;;) {
        uint8_t raw[COLOCACHE_HEADER_BYTES];
        int rc = colocache_receive_stream(vmm->cache, vmm->socket, PEER_TIMEOUT_MS, epoch, raw, NULL);
        if (rc == 0)
            rc = colocache_message_parse(raw, &out->type, &out->epoch, &out->body_len, &out->a, &out->b);
        if (rc)
            return trouble("the connection", rc);
        if (out->type == OUTPUT || out->type == INPUT) { /* of a console, which this machine does not have */
            rc = skip(vmm, out->body_len);
            if (rc)
                return rc;
            continue;
        }
        if (out->type != PING)
            return 0;
        uint64_t ahead;
        struct colocache_status status = {.struct_size = sizeof status};
        colocache_get_status(vmm->cache, &status);
        if (status.sealed_epoch == 0)
            colocache_preflush(vmm->cache, &ahead); /* the initial copy: guest RAM is filled already while it comes */
        rc = send_message(vmm, PONG, 0, 0, NULL, 0);
        if (rc)
            return rc;
    }
}

/* aborted -- the primary gives something up: E_PEER_LOST ends the session, CHECKPOINT_GIVEN_UP does not */
static int aborted(struct vmm *vmm, const struct header *message)
{
    char reason[1025] = "";
    struct colocache_status status = {.struct_size = sizeof status};
    if (message->body_len > 1024 || receive_bytes(vmm, reason, message->body_len) != 0 || message->a != ABORT_CHECKPOINT)
        return COLOCACHE_E_PEER_LOST;
    colocache_get_status(vmm->cache, &status);
    if (status.open_epoch)
        colocache_abort(vmm->cache, status.open_epoch, reason);
    return CHECKPOINT_GIVEN_UP;
}

static int expect(struct vmm *vmm, uint32_t type, uint64_t epoch, struct header *out)
{
    int rc = next_message(vmm, epoch, out);
    if (rc == 0 && out->type == ABORT)
        return aborted(vmm, out);
    return rc ? rc : out->type == type && out->epoch == epoch ? 0 : COLOCACHE_E_PACKET;
}

/* ---- one checkpoint ------------------------------------------------------------------------------------------------ */

/* receive_epoch -- from the request to the last page */
static int receive_epoch(struct vmm *vmm, uint64_t epoch, uint64_t *n_pages_out)
{
    struct header message;
    void *room;
    int rc = send_message(vmm, CHECKPOINT_REPLY, epoch, 0, NULL, 0);
    if (rc == 0)
        rc = expect(vmm, VMSTATE_SEND, epoch, &message);
    if (rc == 0) /* bounds the length before any memory is taken; the bytes go straight into the control region */
        rc = colocache_device_state_begin(vmm->cache, epoch, message.body_len, &room);
    if (rc == 0)
        rc = receive_bytes(vmm, room, message.body_len);
    if (rc == 0)
        rc = expect(vmm, VMSTATE_SIZE, epoch, &message);
    *n_pages_out = (uint64_t)message.b << 32 | message.a;
    return rc;
}

static int checkpoint(struct vmm *vmm, uint64_t epoch)
{
    uint64_t n_pages, checked, wrong;
    if (vmm->can_run)
        guest_pause(&vmm->guest); /* before the log is taken: a vCPU that runs writes pages the log no longer shows */
    int rc = receive_epoch(vmm, epoch, &n_pages);
    if (rc == CHECKPOINT_GIVEN_UP) {
        if (vmm->can_run)
            guest_resume(&vmm->guest);
        return 0;
    }
    if (rc)
        return rc;
    rc = colocache_sync_dirty_log(vmm->cache, vmm->log);
    if (rc == COLOCACHE_E_LOG_LOST)
        rc = colocache_dirty_log_lost(vmm->cache);
    if (rc)
        return trouble("the dirty log", rc);
    struct colocache_seal_args args = {
        .struct_size = sizeof args, .epoch = epoch, .n_pages = n_pages, .check = guest_check_state, .check_context = &vmm->guest};
    struct colocache_seal_result sealed = {.struct_size = sizeof sealed};
    rc = colocache_seal(vmm->cache, &args, &sealed);
    if (rc) { /* nothing was sealed: the SVM's own state is whole, and the epoch is given up */
        const char *why = colocache_last_error();
        (void)trouble("seal", rc);
        send_message(vmm, ABORT, epoch, ABORT_CHECKPOINT, why, strlen(why));
        if (vmm->can_run)
            guest_resume(&vmm->guest);
        return rc == COLOCACHE_E_VETO || rc == COLOCACHE_E_INCOMPLETE ? 0 : rc;
    }
    /* Only now: the primary releases withheld output on it.  A primary that is gone changes nothing from here on. */
    int lost = send_message(vmm, VMSTATE_RECEIVED, epoch, 0, NULL, 0);
    struct colocache_flush_result flushed = {.struct_size = sizeof flushed};
    rc = colocache_flush(vmm->cache, &flushed);
    if (rc)
        return trouble("flush", rc);
    const void *state;
    uint64_t len_bytes;
    rc = colocache_device_state(vmm->cache, &state, &len_bytes);
    if (rc == 0 && guest_load_state(&vmm->guest, state, len_bytes, &checked, &wrong) != 0) {
        colocache_loaded(vmm->cache, 0); /* this machine never runs again, half loaded as it is */
        send_message(vmm, ABORT, epoch, ABORT_LOAD, "the device state did not load", 29);
        return COLOCACHE_E_LOAD_FAILED;
    }
    if (rc == 0)
        rc = colocache_loaded(vmm->cache, 1);
    if (rc < 0)
        return trouble("loaded", rc);
    if (!vmm->can_run) /* what made this memory is in the log of a guest that never ran: it needs no bits */
        colocache_source_discard(vmm->log);
    vmm->can_run = true;
    vmm->checkpoints++;
    vmm->svm_pages += sealed.svm_pages;
    vmm->checked_pages += checked;
    vmm->wrong_pages += wrong;
    printf("{\"event\": \"checkpoint\", \"epoch\": %llu, \"pvm_pages\": %llu, \"svm_pages\": %llu, \"both_pages\": %llu, "
           "\"flushed_pages\": %llu, "
           "\"copy_ns\": %llu, \"verified_pages\": %llu, \"wrong_pages\": %llu}\n",
           (unsigned long long)epoch, (unsigned long long)sealed.pvm_pages, (unsigned long long)sealed.svm_pages,
           (unsigned long long)sealed.both_pages, (unsigned long long)flushed.n_pages, (unsigned long long)flushed.copy_ns,
           (unsigned long long)checked, (unsigned long long)wrong);
    guest_resume(&vmm->guest);
    if (rc == 1 || lost) /* failover was asked for in the meantime, or there is nobody to tell */
        return COLOCACHE_E_PEER_LOST;
    return send_message(vmm, VMSTATE_LOADED, epoch, 0, NULL, 0);
}

/* ---- the session ------------------------------------------------------------------------------------------------------ */

/* follow -- until the primary ends the session (0) or is lost (negative) */
static int follow(struct vmm *vmm)
{
    struct header message;
    for (;;) {
        int rc = next_message(vmm, 0, &message);
        if (rc == 0 && message.type == CHECKPOINT_REQUEST) {
            rc = checkpoint(vmm, message.epoch);
        } else if (rc == 0 && message.type == ABORT) {
            if (message.a == ABORT_END)
                return 0;
            rc = aborted(vmm, &message);
        } else if (rc == 0) {
            rc = COLOCACHE_E_PACKET;
        }
        if (rc < 0)
            return rc;
    }
}

/* take_over -- 0 if this machine runs on now, with every page right */
static int take_over(struct vmm *vmm)
{
    struct colocache_status status = {.struct_size = sizeof status};
    const struct timespec moment = {.tv_nsec = 300000000};
    uint64_t epoch;
    colocache_get_status(vmm->cache, &status);
    if (status.open_epoch) /* half an epoch came: it never touched guest RAM */
        (void)colocache_abort(vmm->cache, status.open_epoch, "the primary is lost");
    int rc = colocache_failover(vmm->cache, &epoch);
    if (rc != 0)
        return trouble("failover", rc);
    guest_pause(&vmm->guest);
    uint64_t at_takeover = guest_verify(&vmm->guest), first_step = vmm->guest.box->step;
    guest_resume(&vmm->guest);
    nanosleep(&moment, NULL);
    guest_pause(&vmm->guest);
    uint64_t afterwards = guest_verify(&vmm->guest);
    uint64_t n_pages = vmm->guest.boot_pages + vmm->guest.ram_pages;
    vmm->checked_pages += 2 * n_pages;
    vmm->wrong_pages += at_takeover + afterwards;
    printf("{\"event\": \"takeover\", \"epoch\": %llu, \"checkpoints\": %llu, \"svm_pages\": %llu, \"ran_on_steps\": %llu, "
           "\"verified_pages\": %llu, \"wrong_pages\": %llu, \"failure\": %s}\n",
           (unsigned long long)epoch, (unsigned long long)vmm->checkpoints, (unsigned long long)vmm->svm_pages,
           (unsigned long long)(vmm->guest.box->step - first_step), (unsigned long long)vmm->checked_pages,
           (unsigned long long)vmm->wrong_pages, vmm->guest.failure ? "true" : "null");
    return vmm->wrong_pages == 0 && !vmm->guest.failure ? 0 : -1;
}

/* ---- memory, and who we are -------------------------------------------------------------------------------------------- */

static void wrote(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages)
{
    struct vmm *vmm = context;
    (void)colocache_mark_dirty(vmm->cache, block, first_pfn, n_pages); /* the dirty log shows what vCPUs write, not us */
}

static int memory(const char *name, uint64_t len_bytes, bool reserve)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    /* reserved whole: a machine that is full says so now, not by a SIGBUS in the middle of an epoch.  A bounded cache is not: its memory
     * comes with the pages, by system calls, and a full machine is an error of the receiving one. */
    int rc = fd < 0 || len_bytes == 0 ? 0 : reserve ? posix_fallocate(fd, 0, (off_t)len_bytes) : ftruncate(fd, (off_t)len_bytes);
    return rc == 0 ? fd : -1;
}

/* create -- control region, two blocks in one file for guest RAM and one for the cache, and the guest on them */
static int create(struct vmm *vmm, const uint64_t n_bytes[2])
{
    struct colocache_options options = {.struct_size = sizeof options,
                                        .memory_mode = vmm->bounded ? COLOCACHE_MEMORY_BOUNDED : COLOCACHE_MEMORY_MIRROR};
    const uint64_t both = n_bytes[0] + n_bytes[1];
    int control = memory("control", 0, true), ram = memory("guest", both, true), cache = memory("cache", both, !vmm->bounded);
    int rc = control < 0 || ram < 0 || cache < 0 ? -ENOMEM : colocache_create(control, &options, &vmm->cache);
    struct colocache_block_info info[2];
    for (uint32_t i = 0; rc == 0 && i < 2; i++) {
        struct colocache_images images = {.struct_size = sizeof images,
                                          .name = i ? "pc.ram" : "boot",
                                          .len_bytes = n_bytes[i],
                                          .page_size = GUEST_PAGE_SIZE,
                                          .guest_fd = ram,
                                          .cache_fd = cache,
                                          .guest_offset = i ? n_bytes[0] : 0,
                                          .cache_offset = i ? n_bytes[0] : 0};
        rc = colocache_add_block(vmm->cache, &images, NULL);
        if (rc == 0)
            rc = colocache_get_block(vmm->cache, i, &info[i]);
    }
    close(control), close(ram), close(cache); /* the library holds its own duplicates */
    if (rc)
        return trouble("create", rc);
    rc = guest_create(&vmm->guest, info[0].guest_addr, info[0].n_pages, info[1].guest_addr, info[1].n_pages, 0);
    if (rc)
        return rc;
    vmm->guest.wrote = wrote;
    vmm->guest.context = vmm;
    const struct colocache_kvm_slot slots[GUEST_SLOTS] = {
        {.slot = 0, .block = 0, .first_pfn = 0, .n_pages = info[0].n_pages},
        {.slot = 1, .block = 1, .first_pfn = 0, .n_pages = vmm->guest.split},
        {.slot = 2, .block = 1, .first_pfn = vmm->guest.split, .n_pages = info[1].n_pages - vmm->guest.split},
    };
    rc = colocache_source_kvm(vmm->guest.vm, slots, GUEST_SLOTS, vmm->guest.manual_protect, &vmm->log);
    return rc ? trouble("the dirty log", rc) : 0;
}

/* greet -- read the primary's HELLO, make the memory it speaks of, answer in kind.  A real VMM has a JSON reader. */
static int greet(struct vmm *vmm)
{
    uint8_t raw[COLOCACHE_HEADER_BYTES];
    struct header message;
    static char hello[HELLO_BYTES_MAX + 1], pair[65], machine[257], answer[HELLO_BYTES_MAX];
    int rc = receive_bytes(vmm, raw, sizeof raw);
    if (rc == 0)
        rc = colocache_message_parse(raw, &message.type, &message.epoch, &message.body_len, &message.a, &message.b);
    if (rc || message.type != HELLO || message.body_len > HELLO_BYTES_MAX || receive_bytes(vmm, hello, message.body_len) != 0)
        return rc ? rc : COLOCACHE_E_PACKET;
    const char *pair_at = strstr(hello, "\"pair\":"), *machine_at = strstr(hello, "\"machine\":"), *blocks = strstr(hello, "\"blocks\":");
    unsigned long long n_bytes[2];
    if (!pair_at || !machine_at || !blocks || sscanf(pair_at, "\"pair\":\"%64[^\"]", pair) != 1 ||
        sscanf(machine_at, "\"machine\":\"%256[^\"]", machine) != 1 ||
        sscanf(blocks, "\"blocks\":[[\"boot\",%llu,4096],[\"pc.ram\",%llu,4096]]", &n_bytes[0], &n_bytes[1]) != 2)
        return trouble("this VMM has the blocks boot and pc.ram, with pages of 4096 bytes", COLOCACHE_E_PACKET);
    rc = create(vmm, (const uint64_t[]){n_bytes[0], n_bytes[1]});
    if (rc)
        return rc;
    struct colocache_status status = {.struct_size = sizeof status};
    char history[33] = "";
    colocache_get_status(vmm->cache, &status);
    for (int i = 0; i < 16; i++)
        snprintf(history + 2 * i, 3, "%02x", status.history_id[i]);
    int n = snprintf(answer, sizeof answer,
                     "{\"wire_version\":%d,\"role\":\"secondary\",\"pair\":\"%s\",\"history\":\"%s\",\"sealed_epoch\":0,"
                     "\"used_epoch\":0,\"lost\":false,\"machine\":\"%s\",\"blocks\":[[\"boot\",%llu,4096],[\"pc.ram\",%llu,4096]],"
                     "\"streams\":1,\"session\":null,\"in_flight\":0,\"rejoin\":false,\"disks\":[],\"disk_log\":0}",
                     CONVERSATION_VERSION, pair, history, machine, n_bytes[0], n_bytes[1]);
    rc = send_message(vmm, HELLO, 0, 0, answer, (uint64_t)n);
    return rc ? rc : send_message(vmm, CHECKPOINT_READY, 0, 0, NULL, 0);
}

static int wait_for_primary(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (strlen(path) >= sizeof address.sun_path)
        return -1;
    strcpy(address.sun_path, path);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 1) != 0) {
        perror("vmm_secondary: listening");
        return -1;
    }
    printf("{\"event\": \"listening\", \"address\": \"unix:%s\"}\n", path);
    struct pollfd wait = {.fd = listener, .events = POLLIN};
    int connection = poll(&wait, 1, 30000) == 1 ? accept4(listener, NULL, NULL, SOCK_CLOEXEC) : -1;
    close(listener);
    unlink(path);
    return connection;
}

int main(int argc, char **argv)
{
    struct vmm vmm = {.bounded = argc == 3 && strcmp(argv[2], "bounded") == 0};
    if (argc != 2 + vmm.bounded) {
        fprintf(stderr, "usage: vmm_secondary SOCKET [bounded]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    vmm.socket = wait_for_primary(argv[1]);
    if (vmm.socket < 0)
        return 2;
    int rc = greet(&vmm);
    if (rc)
        return rc > 0 ? rc : 2;
    rc = follow(&vmm);
    close(vmm.socket);
    if (rc == 0) {
        printf("{\"event\": \"end\", \"checkpoints\": %llu, \"wrong_pages\": %llu}\n", (unsigned long long)vmm.checkpoints,
               (unsigned long long)vmm.wrong_pages);
        rc = 3; /* in order, but no takeover */
    } else {
        rc = rc == COLOCACHE_E_LOAD_FAILED ? 1 : take_over(&vmm) == 0 ? 0 : 1;
    }
    guest_destroy(&vmm.guest); /* the VM first: it runs on the library's mappings */
    colocache_source_close(vmm.log);
    colocache_close(vmm.cache);
    return rc;
}
