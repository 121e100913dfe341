//! `lite-llm doctor`: what this machine has, and what is missing.

use anyhow::Result;
use lite_llm_kernels::{
    cpu::Cpu,
    cuda::{self, compile::compiler_present},
    math::Math,
    measure,
    simd::Simd,
};
use serde_json::{Value, json};

use crate::{machine, size::Size};

/// Bytes read to measure the memory: more than any cache holds.
const MEASURE_BYTES: usize = 512 << 20;

pub(super) fn doctor(json: bool) -> Result<()> {
    let cores = machine::cores();
    let simd: Vec<String> = Simd::available().iter().map(ToString::to_string).collect();
    let (free, total) = (machine::free_memory(), machine::total_memory());
    let room = free.is_none_or(|free| free > 2 * MEASURE_BYTES as u64);
    let bandwidth = room.then(|| measure::read_bandwidth(&Cpu::best(cores), MEASURE_BYTES));
    let quic = std::net::UdpSocket::bind(("127.0.0.1", 0)).map(|_| ()).map_err(|e| e.to_string());
    let gpus = cuda::find().map_err(|error| error.to_string());
    if json {
        let line = json!({
            "cores": cores,
            "simd": simd,
            "memory_bytes": total,
            "memory_free_bytes": free,
            "read_bytes_per_second": bandwidth,
            "loopback_udp": quic.is_ok(),
            "gpus": gpus.as_ref().map_or_else(|_| json!([]), |(_, gpus)| gpus.iter().map(gpu).collect()),
            "gpu_driver_cuda": gpus.as_ref().ok().map(|(version, _)| version),
            "gpu_error": gpus.as_ref().err(),
            "gpu_compiler": compiler_present(),
            "math": maths(gpus.as_ref().is_ok_and(|(_, gpus)| !gpus.is_empty())),
        });
        say!("{line}");
        return Ok(());
    }
    let size = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), |b| Size(b).to_string());
    say!("cores      {cores}");
    say!("vectors    {} (fastest is used)", simd.join(", "));
    say!("memory     {} free of {}", size(free), size(total));
    match bandwidth {
        Some(bandwidth) => say!("           read at {:.1} GB/s", bandwidth / 1e9),
        None => say!("           not measured: too little is free"),
    }
    match quic {
        Ok(()) => say!("network    loopback UDP works"),
        Err(error) => say!("network    loopback UDP does not work: {error}"),
    }
    match &gpus {
        Ok((version, gpus)) => {
            for gpu in gpus {
                let (free, total) = (Size(gpu.free), Size(gpu.total));
                say!("gpu        {}, {}: {free} free of {total}", gpu.name, gpu.arch);
            }
            if gpus.is_empty() {
                say!("gpu        NVIDIA's driver is here, but no GPU");
            }
            say!("           driver for CUDA {version}");
            if !gpus.is_empty() {
                say!(
                    "           --math exact has the CPU's bits; --math fast computes bf16 models by \
                     the tensor cores"
                );
            }
            match compiler_present() {
                true => say!("           NVRTC is here: kernels are compiled at their first use"),
                false => say!(
                    "           NVRTC (libnvrtc.so.13) was not found: --device cuda needs CUDA 13's"
                ),
            }
        }
        Err(reason) => say!("gpu        none is used: {}", reason.trim_start_matches("gpu: ")),
    }
    Ok(())
}

/// How products can be computed here.
fn maths(gpu: bool) -> Vec<&'static str> {
    let here = Math::ALL.into_iter().filter(|math| gpu || *math == Math::Exact);
    here.map(Math::name).collect()
}

fn gpu(gpu: &cuda::GpuInfo) -> Value {
    json!({
        "name": gpu.name,
        "arch": gpu.arch,
        "memory_free_bytes": gpu.free,
        "memory_bytes": gpu.total,
    })
}
