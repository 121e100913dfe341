//! Checks every CUDA kernel against its CPU truth, bit for bit, and measures it beside the card's
//! own reading rate: `cuda_check [--sources DIR] [--cache DIR] [check] [time] [step] [link]`.
//!
//! Outputs are poisoned first, so that a value that is not written is seen. Two NaN are equal. The
//! exit code is 1 if anything differs. `kernels/cuda/check.sh` runs it where there is a GPU.

mod cuda_check {
    pub(crate) mod checks;
    pub(crate) mod fast;
    pub(crate) mod fused;
    pub(crate) mod link;
    pub(crate) mod seam;
    pub(crate) mod speed;
    pub(crate) mod step;
    pub(crate) mod truth;
}

use std::{path::PathBuf, process::ExitCode, time::Instant};

use lite_llm_kernels::{
    cpu::Cpu,
    cuda::{Cuda, compile::Folders},
    device::DeviceError,
};

use cuda_check::{checks, link, speed, step, truth::Check};

fn run(folders: Folders, what: &[String]) -> Result<usize, DeviceError> {
    let from = Instant::now();
    let cuda = Cuda::open(0, folders.clone())?;
    let (free, all) = cuda.memory()?;
    println!(
        "{}: {} multiprocessors, {:.1} of {:.1} GB free",
        cuda.describe(),
        cuda.processors(),
        free as f64 / 1e9,
        all as f64 / 1e9
    );
    let wanted = |name: &str| what.is_empty() || what.iter().any(|w| w == name);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
    let mut check = Check::new(Cpu::best(threads), &cuda);
    check.narrow = what.iter().any(|w| w == "narrow");
    check.many = what.iter().any(|w| w == "many");
    if wanted("check") {
        checks::all(&mut check, what)?;
        println!(
            "checked {} results, {} differ ({:.0} s)",
            check.done,
            check.wrong.len(),
            from.elapsed().as_secs_f64()
        );
        for wrong in &check.wrong {
            println!("DIFFERS {wrong}");
        }
    }
    let measured = wanted("time") || wanted("step");
    let peak = if measured { speed::reading(&cuda)? } else { 0.0 };
    if wanted("time") {
        speed::all(&cuda, peak)?;
    }
    if wanted("step") {
        step::all(&cuda, peak, what)?;
    }
    if wanted("link") {
        link::all(&cuda, folders)?;
    }
    println!("{:.0} s in all", from.elapsed().as_secs_f64());
    Ok(check.wrong.len())
}

fn main() -> ExitCode {
    let mut folders = Folders::default();
    let mut what = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--sources" => folders.sources = args.next().map(PathBuf::from),
            "--cache" => folders.cache = args.next().map(PathBuf::from),
            _ => what.push(arg),
        }
    }
    match run(folders, &what) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(wrong) => {
            eprintln!("{wrong} results differ from the CPU's");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
