//! Blocks at random places of a large file: the block reader, and a bare io_uring loop written here,
//! in turns within one run.
//!
//! `cargo bench -p lite-llm-runtime --bench blocks` writes a file of 8 GiB into the current folder and
//! deletes it; `-- FILE` reads one that is there. `-- FILE sweep` compares sizes of requests.

#[cfg(target_os = "linux")]
fn main() {
    linux::main();
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("There is no io_uring here to compare with.");
}

#[cfg(target_os = "linux")]
mod linux {
    use std::{
        fs::{self, File},
        io::Write,
        os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
        path::{Path, PathBuf},
        time::Instant,
    };

    use io_uring::{IoUring, opcode, types};
    use lite_llm_kernels::slots::{Slot, SlotPool};
    use lite_llm_runtime::blocks::{BlockOptions, measure::measure};

    const FILE: u64 = 8 << 30;
    const TOTAL: u64 = 3 << 30;
    const ROUNDS: u32 = 12;

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (self.0 >> 20) % n
        }
    }

    struct Written(PathBuf);

    impl Drop for Written {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn write(path: &Path) -> Written {
        let written = Written(path.to_owned());
        let mut file = File::create(path).expect("a file in the current folder");
        let mut random = Random(1);
        let mut piece: Vec<u8> = (0..4 << 20).map(|_| random.below(256) as u8).collect();
        for number in 0..FILE / piece.len() as u64 {
            piece[..8].copy_from_slice(&number.to_le_bytes());
            file.write_all(&piece).expect("room for the file");
        }
        file.sync_all().expect("the file on the disk");
        written
    }

    /// Bytes per second of a loop that does nothing else.
    fn bare(
        path: &Path,
        block: usize,
        total: u64,
        options: &BlockOptions,
        random: &mut Random,
    ) -> f64 {
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
        let file = file.expect("a file system that has O_DIRECT");
        let places = (file.metadata().expect("its size").len() - block as u64) / 4096;
        let mut ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(512)
            .expect("a kernel that has io_uring");
        let parts = block.div_ceil(options.chunk);
        let chunk = block.div_ceil(parts).next_multiple_of(4096);
        let at_once = (2 * options.in_flight / block).clamp(4, 512);
        let pool = SlotPool::new((at_once * block) as u64);
        let mut slots: Vec<Slot> =
            (0..at_once).map(|_| pool.take(block).expect("within the budget")).collect();
        slots.iter_mut().for_each(|slot| slot.fill(1));
        let bases: Vec<*mut u8> = slots.iter_mut().map(|s| s.raw_mut().as_mut_ptr()).collect();
        let mut free: Vec<usize> = (0..at_once).collect();
        let mut left = vec![0; at_once];
        let blocks = (total / block as u64).max(1);
        let (mut begun, mut ended, mut in_flight) = (0, 0, 0);
        let mut at: Option<(usize, u64, usize)> = None;
        let clock = Instant::now();
        while ended < blocks {
            while in_flight < options.in_flight {
                let (slot, offset, from) = match at.take() {
                    Some(at) => at,
                    None if begun == blocks => break,
                    None => {
                        let Some(slot) = free.pop() else { break };
                        (begun, left[slot]) = (begun + 1, block.div_ceil(chunk));
                        (slot, random.below(places) * 4096, 0)
                    }
                };
                let bytes = chunk.min(block - from);
                let begin = bases[slot].wrapping_add(from);
                let read = opcode::Read::new(types::Fd(file.as_raw_fd()), begin, bytes as u32);
                let tag = (slot as u64) << 32 | bytes as u64;
                let read = read.offset(offset + from as u64).build().user_data(tag);
                // SAFETY: the bytes lie in a slot that lives, untouched, until the loop has seen
                // all completions or the process ends by a failed assertion.
                unsafe { ring.submission().push(&read).expect("fewer requests than entries") };
                in_flight += bytes;
                at = (from + bytes < block).then_some((slot, offset, from + bytes));
            }
            ring.submit_and_wait(1).expect("requests are taken");
            for entry in ring.completion() {
                let (slot, bytes) = ((entry.user_data() >> 32) as usize, entry.user_data() as u32);
                if entry.result() != bytes as i32 {
                    eprintln!("a read of {bytes} bytes gave {}", entry.result());
                    std::process::abort();
                }
                in_flight -= bytes as usize;
                left[slot] -= 1;
                if left[slot] == 0 {
                    free.push(slot);
                    ended += 1;
                }
            }
        }
        (blocks * block as u64) as f64 / clock.elapsed().as_secs_f64()
    }

    /// Median of the rounds' ratios, and the rates of all rounds together in GB/s: the reader, the
    /// loop here, the library's loop.
    fn compare(path: &Path, block: usize, options: &BlockOptions, random: &mut Random) -> [f64; 4] {
        let (mut times, mut ratios) = ([0.0; 3], Vec::new());
        for _ in 0..ROUNDS {
            let each = TOTAL / u64::from(ROUNDS);
            let loop_here = bare(path, block, each, options, random);
            let rates = measure(path, block, each, 1, options, |n| random.below(n));
            let rates = rates.expect("the file can be read");
            let again = bare(path, block, each, options, random);
            // The loop's rate around the reader's turn, for a disk whose rate changes.
            let around = 2.0 / (1.0 / loop_here + 1.0 / again);
            ratios.push(rates.reader / around);
            let library = rates.bare.unwrap_or(f64::NAN);
            for (time, rate) in times.iter_mut().zip([rates.reader, around, library]) {
                *time += 1.0 / rate;
            }
        }
        ratios.sort_by(f64::total_cmp);
        let [reader, loop_here, library] = times.map(|time| f64::from(ROUNDS) / time / 1e9);
        [ratios[ratios.len() / 2], reader, loop_here, library]
    }

    pub(crate) fn main() {
        let args: Vec<String> =
            std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
        let (path, _written) = match args.first() {
            Some(path) => (PathBuf::from(path), None),
            None => {
                let path = PathBuf::from(format!("blocks-{}.tmp", std::process::id()));
                let written = write(&path);
                (path, Some(written))
            }
        };
        let mut random = Random(Instant::now().elapsed().as_nanos() as u64 + 7);
        let sweep = args.get(1).is_some_and(|arg| arg == "sweep");
        let settings: Vec<BlockOptions> = if sweep {
            let sizes = [
                (256, 4),
                (256, 8),
                (512, 4),
                (512, 8),
                (1024, 2),
                (1024, 4),
                (1024, 8),
                (1024, 16),
                (2048, 8),
                (8192, 16),
            ];
            let of = |(kib, mib): (usize, usize)| BlockOptions {
                chunk: kib << 10,
                in_flight: mib << 20,
                ..BlockOptions::default()
            };
            sizes.map(of).to_vec()
        } else {
            let with = BlockOptions::default();
            let threads = BlockOptions { ring: false, ..with.clone() };
            let cached = BlockOptions { direct: false, ..threads.clone() };
            vec![with, threads, cached]
        };
        for options in settings {
            for kib in [400, 2048, 6300] {
                let [ratio, reader, here, library] =
                    compare(&path, kib << 10, &options, &mut random);
                println!(
                    "ring {} direct {} blocks {kib} KiB, requests {} KiB, in flight {} MiB: reader {reader:.3} GB/s, bare loop {here:.3}, \
                     library's loop {library:.3}; reader / bare {:.3}, median {ratio:.3}",
                    options.ring,
                    options.direct,
                    options.chunk >> 10,
                    options.in_flight >> 20,
                    reader / here,
                );
            }
        }
    }
}
