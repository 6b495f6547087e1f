// SPDX-License-Identifier: Apache-2.0
// caller.cpp -- the smallest secondary in C++: one block by address, one epoch, one veto.  Shows that the header is clean C++17.
#include <colocache.h>

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

namespace {

constexpr std::uint32_t page_size = 4096;
constexpr std::uint64_t n_pages = 70;

struct Close {
    void operator()(colocache *cache) const { colocache_close(cache); }
};
using Cache = std::unique_ptr<colocache, Close>;

void must(int rc, const char *what)
{
    if (rc >= 0)
        return;
    std::fprintf(stderr, "%s: %s\n", what, colocache_last_error());
    std::exit(1);
}

struct Pages {
    alignas(4096) std::array<unsigned char, n_pages * page_size> bytes;
};

extern "C" int refuse_bad(void *seen, const void *state, std::uint64_t len_bytes)
{
    *static_cast<std::string *>(seen) = std::string(static_cast<const char *>(state), len_bytes);
    return len_bytes == 3 && std::memcmp(state, "bad", 3) == 0 ? 7 : 0;
}

void state_is(const Cache &cache, std::uint64_t epoch, const std::string &text)
{
    void *room = nullptr;
    must(colocache_device_state_begin(cache.get(), epoch, text.size(), &room), "device_state_begin");
    std::memcpy(room, text.data(), text.size());
}

int seal(const Cache &cache, std::uint64_t epoch, std::string &seen)
{
    colocache_seal_args args{};
    args.struct_size = sizeof args;
    args.epoch = epoch;
    args.n_pages = 1;
    args.check = refuse_bad;
    args.check_context = &seen;
    colocache_seal_result result{};
    result.struct_size = sizeof result;
    return colocache_seal(cache.get(), &args, &result);
}

} // namespace

int main()
{
    const int control = memfd_create("caller", MFD_CLOEXEC);
    colocache *made = nullptr;
    must(colocache_create(control, nullptr, &made), "create");
    const Cache cache(made);
    close(control);

    auto guest = std::make_unique<Pages>(), copy = std::make_unique<Pages>();
    guest->bytes.fill(0);
    copy->bytes.fill(0);
    colocache_images images{};
    images.struct_size = sizeof images;
    images.name = "ram";
    images.len_bytes = n_pages * page_size;
    images.page_size = page_size;
    images.guest_fd = images.cache_fd = -1;
    images.guest_addr = guest->bytes.data();
    images.cache_addr = copy->bytes.data();
    std::uint32_t block = 99;
    must(colocache_add_block(cache.get(), &images, &block), "add_block");

    std::array<unsigned char, page_size> page{};
    page.fill(0xA5);
    std::string seen;
    must(colocache_receive_page(cache.get(), 1, block, 69, page.data(), page.size()), "receive_page");
    state_is(cache, 1, "bad");
    const bool vetoed = seal(cache, 1, seen) == COLOCACHE_E_VETO && guest->bytes[69 * page_size] == 0;
    must(colocache_receive_page(cache.get(), 2, block, 0, page.data(), page.size()), "receive_page");
    state_is(cache, 2, "good");
    must(seal(cache, 2, seen), "seal");
    must(colocache_flush(cache.get(), nullptr), "flush");
    must(colocache_loaded(cache.get(), 1), "loaded");
    std::uint64_t epoch = 0;
    must(colocache_failover(cache.get(), &epoch), "failover");

    const bool right = vetoed && seen == "good" && epoch == 2 && guest->bytes == copy->bytes && guest->bytes[69 * page_size] == 0xA5;
    std::printf("%x %s\n", static_cast<unsigned>(colocache_version()), right ? "right" : "wrong");
    return right ? 0 : 1;
}
