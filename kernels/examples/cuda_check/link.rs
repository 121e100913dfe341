//! What two GPUs say to each other of a batch whose experts are spread over both, without the experts.

use std::time::Instant;

use lite_llm_kernels::{
    cuda::{Cuda, compile::Folders, copy::Lane, find},
    device::DeviceError,
};

/// OLMoE-1B-7B's.
const HIDDEN: usize = 2048;
const ROUTES: usize = 8;

/// As `Gpu::networks` does it: the second reads all rows and routes, and writes what its half of the routes gave
/// into the first one's memory. By the host's clock, beside `gpu/link_x2.py`'s all-to-all.
pub(crate) fn all(cuda: &Cuda, folders: Folders) -> Result<(), DeviceError> {
    if find()?.1.len() < 2 {
        println!("no second GPU");
        return Ok(());
    }
    let other = Cuda::open(1, folders)?;
    cuda.reach(&other)?;
    other.reach(cuda)?;
    for tokens in [1, 8, 64, 128, 1024, 4096] {
        let routes = tokens * ROUTES / 2;
        let rows = cuda.filled::<f32>(tokens * HIDDEN, 0x3c)?;
        let index = cuda.filled::<u32>(tokens * ROUTES, 0)?;
        let parts = cuda.filled::<f32>(routes * HIDDEN, 0)?;
        let picks: Vec<u32> = (0..routes as u32).map(|route| route % tokens as u32).collect();
        let picks = other.upload(&picks)?;
        let exchange = || -> Result<(), DeviceError> {
            let ready = cuda.record(Lane::Compute)?;
            other.stream_wait(Lane::Compute, &ready)?;
            let own = other.scratch(rows.len())?;
            other.copy_from(cuda, &rows, &own)?;
            let own_index = other.scratch(index.len())?;
            other.copy_from(cuda, &index, &own_index)?;
            other.select_rows(&own, &picks, HIDDEN, &parts)?;
            cuda.stream_wait(Lane::Compute, &other.record(Lane::Compute)?)?;
            cuda.wait()
        };
        let mut times = Vec::new();
        for run in 0..40 {
            cuda.wait()?;
            other.wait()?;
            let from = Instant::now();
            exchange()?;
            if run >= 10 {
                times.push(from.elapsed().as_secs_f64());
            }
        }
        times.sort_by(f64::total_cmp);
        let bytes = (rows.len() + index.len() + parts.len()) * size_of::<f32>();
        let median = times[times.len() / 2];
        println!(
            "there and back, {tokens} tokens x {HIDDEN} f32, {routes} routes by the second GPU: {:.0} us, {:.1} GB/s",
            median * 1e6,
            bytes as f64 / median / 1e9
        );
    }
    Ok(())
}
