/* SPDX-License-Identifier: Apache-2.0 */
/* lookout.c, and what stream.c does with it: when a reader looks out, and when it sleeps. */
#include "rig.h"

#include <poll.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "checksum.h"
#include "lookout.h"
#include "message.h"

#define N_PAGES 8u

/* A connection as this test wants it, instead of libc's calls: `at_once` bytes are there, then once none, then the next ones, however
 * soon they are asked for.  So a reader that looks out has them without a sleep, and one that sleeps asks `poll` first. */
static struct {
    size_t at_once, left;
    unsigned n_none, n_sleeps;
} link_of;

ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
    (void)flags;
    if (link_of.left == 0) {
        link_of.left = link_of.at_once;
        link_of.n_none++;
        errno = EAGAIN;
        return -1;
    }
    struct iovec *first = msg->msg_iov;
    ssize_t n = read(fd, first->iov_base, first->iov_len < link_of.left ? first->iov_len : link_of.left);
    if (n > 0)
        link_of.left -= (size_t)n;
    return n;
}

int poll(struct pollfd *fds, nfds_t n_fds, int timeout_ms)
{
    (void)fds;
    (void)timeout_ms;
    link_of.n_sleeps++;
    return (int)n_fds;
}

/* receive -- one packet of N_PAGES pages, of which so many bytes come at once: how often the reader slept */
static unsigned receive(size_t at_once)
{
    static uint8_t bytes[COLOCACHE_HEADER_BYTES + sizeof(struct cc_run) + N_PAGES * 4096];
    static const uint64_t blocks[] = {N_PAGES};
    const struct cc_run run = {.n_pages = N_PAGES};
    struct cc_message message = {.type = COLOCACHE_MSG_PAGES, .b = 1, .epoch = 1, .body_len_bytes = sizeof bytes - COLOCACHE_HEADER_BYTES};
    struct rig rig;
    int pair[2], room = 1 << 20;
    uint64_t n_pages = 0;
    rig_open(&rig, 1, blocks, 4096, false);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    REQUIRE(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
    cc_message_put(bytes, &message);
    message.checksum = cc_message_checksum(bytes, &run, sizeof run);
    cc_message_put(bytes, &message);
    memcpy(bytes + COLOCACHE_HEADER_BYTES, &run, sizeof run);
    REQUIRE(write(pair[0], bytes, sizeof bytes) == (ssize_t)sizeof bytes && shutdown(pair[0], SHUT_WR) == 0);
    memset(&link_of, 0, sizeof link_of);
    link_of.at_once = at_once;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    CHECK_RC(COLOCACHE_E_PEER_LOST, colocache_receive_stream(rig.cc, pair[1], 1000, 1, header, &n_pages));
    CHECK_EQ(N_PAGES, n_pages);
    close(pair[0]);
    close(pair[1]);
    rig_close(&rig);
    return link_of.n_sleeps;
}

/* Bytes that drip, as from a slow link, are slept for every time, though each of them comes at once. */
static void bytes_that_drip_are_slept_for(void)
{
    const unsigned n_sleeps = receive(1448);
    CHECK(link_of.n_none > 20);
    CHECK_EQ(link_of.n_none, n_sleeps);
}

static void much_at_a_time_is_looked_out_for_but_not_at_the_first_wait(void)
{
    const unsigned n_sleeps = receive(CC_LOOKOUT_PAYS);
    CHECK_EQ(3, link_of.n_none); /* before the packet, in its middle, before its last bytes */
    CHECK_EQ(1, n_sleeps);
}

/* ended -- a look-out whose moment is over */
static void ended(struct cc_lookout *lookout)
{
    CHECK(lookout->until_ns != 0);
    lookout->until_ns = 1;
    CHECK(!cc_look_out(lookout));
    CHECK(lookout->until_ns == 0);
}

static void looking_out_in_vain_is_paid_with_sleeps(void)
{
    struct cc_lookout lookout = {0};
    CHECK(!cc_look_out(&lookout)); /* nothing has come */
    for (uint32_t in_vain = 1; in_vain < 12; in_vain++) {
        for (uint32_t n = lookout.sleeps; n; n--) {
            cc_lookout_came(&lookout, CC_LOOKOUT_PAYS);
            CHECK(!cc_look_out(&lookout));
        }
        cc_lookout_came(&lookout, CC_LOOKOUT_PAYS);
        CHECK(cc_look_out(&lookout));
        ended(&lookout);
        CHECK_EQ(in_vain < CC_LOOKOUT_SLEEPS_MAX ? in_vain : CC_LOOKOUT_SLEEPS_MAX, lookout.in_vain);
        CHECK_EQ(lookout.in_vain, lookout.sleeps);
    }
}

static void a_look_out_pays_only_if_it_brings_much(void)
{
    struct cc_lookout lookout = {0};
    cc_lookout_came(&lookout, CC_LOOKOUT_PAYS);
    CHECK(cc_look_out(&lookout));
    cc_lookout_came(&lookout, CC_LOOKOUT_PAYS - 1); /* before its moment was over */
    CHECK(!cc_look_out(&lookout));
    CHECK_EQ(1, lookout.in_vain);
    CHECK_EQ(1, lookout.sleeps);
    cc_lookout_came(&lookout, CC_LOOKOUT_PAYS);
    CHECK(!cc_look_out(&lookout)); /* the sleep that it owed */
    cc_lookout_came(&lookout, CC_LOOKOUT_PAYS);
    CHECK(cc_look_out(&lookout));
    cc_lookout_came(&lookout, CC_LOOKOUT_PAYS / 2); /* in two pieces */
    cc_lookout_came(&lookout, CC_LOOKOUT_PAYS / 2);
    CHECK(cc_look_out(&lookout));
    CHECK_EQ(0, lookout.in_vain);
}

int main(void)
{
    RUN(bytes_that_drip_are_slept_for);
    RUN(much_at_a_time_is_looked_out_for_but_not_at_the_first_wait);
    RUN(looking_out_in_vain_is_paid_with_sleeps);
    RUN(a_look_out_pays_only_if_it_brings_much);
    return DONE();
}
