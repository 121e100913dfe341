//! Every CUDA kernel compiles, without a GPU: where NVRTC is there (`pip install
//! "nvidia-cuda-nvrtc==13.0.*"`, its folder on `LD_LIBRARY_PATH`). That their bits are the CPU's is
//! shown by `kernels/cuda/check.sh` on a machine that has a GPU.

use lite_llm_kernels::cuda::{
    Cuda,
    compile::{Folders, Source, code, compile, compiler_present},
    driver_present,
};

#[test]
fn every_kernel_compiles_for_old_and_new_cards() {
    if !compiler_present() {
        println!("skipped: NVRTC (libnvrtc.so.13) was not found");
        return;
    }
    // The many formats of the tiles take half a minute each: `.ci/long` has them for both cards.
    let long = std::env::var_os("LITE_LLM_CUDA_ALL").is_some();
    for source in Source::all() {
        let old = (long || !source.name().contains("tile")).then_some("sm_80");
        for arch in old.into_iter().chain(["sm_90a"]) {
            let code = compile(source, arch, &Folders::default());
            let code = code.unwrap_or_else(|error| panic!("{error}"));
            assert!(code.starts_with(b"\x7fELF"), "{} is code for {arch}", source.name());
        }
    }
}

#[test]
fn code_is_kept_and_a_source_that_does_not_compile_says_why() {
    if !compiler_present() {
        println!("skipped: NVRTC (libnvrtc.so.13) was not found");
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let sources = tempfile::tempdir().unwrap();
    let kept = Folders { cache: Some(cache.path().into()), sources: None };
    let first = code(Source::Norm, "sm_90a", &kept, false).unwrap();
    let files = || std::fs::read_dir(cache.path()).unwrap().map(|f| f.unwrap().path());
    assert_eq!(files().count(), 1);
    // What is read is the file: a damaged one comes back until a fresh one is asked for.
    std::fs::write(files().next().unwrap(), b"damaged").unwrap();
    assert_eq!(code(Source::Norm, "sm_90a", &kept, false).unwrap(), b"damaged");
    assert_eq!(code(Source::Norm, "sm_90a", &kept, true).unwrap(), first);
    assert_eq!(code(Source::Norm, "sm_90a", &kept, false).unwrap(), first);

    std::fs::write(sources.path().join("norm.cu"), "ENTRY broken( {").unwrap();
    let broken = Folders { cache: Some(cache.path().into()), sources: Some(sources.path().into()) };
    let error = code(Source::Norm, "sm_90a", &broken, false).unwrap_err();
    assert!(error.contains("norm.cu") && error.contains("error"), "{error}");
    assert_eq!(files().count(), 1, "what does not compile is not kept");
}

#[test]
fn a_machine_without_a_gpu_is_told_so() {
    if driver_present() {
        println!("skipped: this machine has NVIDIA's driver");
        return;
    }
    let error = Cuda::open(0, Folders::default()).err().unwrap().to_string();
    assert!(error.contains("cuda:0") && error.contains("libcuda.so.1"), "{error}");
}
