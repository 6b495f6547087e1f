// SPDX-License-Identifier: Apache-2.0
// caller.rs -- the smallest caller in Rust, by the C ABI alone: an error and its sentence, and one message header there and back.
use std::ffi::{c_char, c_int, c_void, CStr};

#[link(name = "colocache")]
extern "C" {
    fn colocache_version() -> u32;
    fn colocache_last_error() -> *const c_char;
    fn colocache_create(control_fd: c_int, options: *const c_void, out: *mut *mut c_void) -> c_int;
    fn colocache_message_header(header: *mut u8, kind: u32, epoch: u64, body_len_bytes: u64, a: u32, b: u32) -> c_int;
    fn colocache_message_parse(
        header: *const u8, kind: *mut u32, epoch: *mut u64, body_len_bytes: *mut u64, a: *mut u32, b: *mut u32,
    ) -> c_int;
}

fn main() {
    let mut cache: *mut c_void = std::ptr::null_mut();
    let mut header = [0u8; 40];
    let (mut kind, mut epoch, mut body, mut a, mut b) = (0u32, 0u64, 0u64, 0u32, 0u32);
    // SAFETY: the pointers are to locals of the sizes that colocache.h says.
    unsafe {
        let refused = colocache_create(-1, std::ptr::null(), &mut cache);
        let sentence = CStr::from_ptr(colocache_last_error()).to_string_lossy().into_owned();
        assert!(refused < 0 && cache.is_null() && !sentence.is_empty(), "{refused} {sentence}");
        assert_eq!(colocache_message_header(header.as_mut_ptr(), 0x103, 7, 9, 1, 2), 0);
        assert_eq!(colocache_message_parse(header.as_ptr(), &mut kind, &mut epoch, &mut body, &mut a, &mut b), 0);
        assert_eq!((kind, epoch, body, a, b), (0x103, 7, 9, 1, 2));
        header[8] ^= 1;
        assert_eq!(colocache_message_parse(header.as_ptr(), &mut kind, &mut epoch, &mut body, &mut a, &mut b), -20022);
        println!("{:x} right", colocache_version());
    }
}
