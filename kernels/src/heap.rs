//! The process's heap.

/// Keeps freed memory in the process, to be allocated again, instead of giving it back to the system.
///
/// For work that allocates the same sizes again and again, as steps of training do: pages that are new to the
/// process cost more than what is computed on them. It concerns the whole process, stays so, and does nothing where
/// the C library is not glibc. To be called before there are threads: those that have allocated keep their own part of
/// the heap, which is given back whenever it is empty.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt may be called at any time from any thread.
    unsafe {
        // The largest that glibc takes: larger blocks are still the system's own.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
