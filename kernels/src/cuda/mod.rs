//! NVIDIA GPUs: the kernels of `kernels/cuda/*.cu`, with the very bits of the CPU.
//!
//! Owns: the device's context and stream, its memory, the code of the kernels (compiled for the
//! device that is found, see [`compile`]) and how each is launched ([`launch`]). Libraries are
//! loaded when a device is asked for; a machine without CUDA gets an error that says so.
//!
//! One thread at a time gives a device work; all work of one [`Cuda`] is done in order.

pub mod compile;
pub mod copy;
pub mod descend;
pub mod fast;
pub mod launch;
mod measuring;
mod memory;
pub mod one;
pub mod sample;
pub mod tile;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytemuck::Pod;
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaModule, CudaStream, DriverError, result,
    sys,
};
use cudarc::nvrtc::Ptx;

use self::{
    compile::{Folders, Source},
    memory::{Args, Block, Pool},
};
use crate::device::DeviceError;

pub use self::memory::Dev;
pub use cudarc::driver::CudaGraph as Graph;

/// The driver that these kernels' compiler writes code for, as CUDA counts: 13.0.
const DRIVER_VERSION: i32 = 13_000;

type Found = Result<CudaFunction, DeviceError>;

/// A GPU, and what was compiled for it.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    recording: AtomicBool,
    name: String,
    arch: String,
    processors: usize,
    shared_max: u32,
    starts_early: bool,
    wide: AtomicBool,
    folders: Folders,
    lost: OnceLock<String>,
    pool: Arc<Pool>,
    modules: Mutex<HashMap<Source, Arc<CudaModule>>>,
    functions: Mutex<HashMap<(Source, &'static str), CudaFunction>>,
}

/// How many blocks of how many threads, and their dynamic shared memory in bytes.
#[derive(Clone, Copy)]
struct Grid {
    blocks: [usize; 3],
    threads: u32,
    shared: usize,
}

impl Grid {
    fn new(blocks: usize, threads: u32) -> Self {
        Self { blocks: [blocks, 1, 1], threads, shared: 0 }
    }
}

/// Whether this machine has NVIDIA's driver; without it nothing here can be used.
pub fn driver_present() -> bool {
    // SAFETY: it opens a library, whose initialisers NVIDIA answers for.
    unsafe { sys::is_culib_present() }
}

fn failed(device: &str, reason: impl ToString) -> DeviceError {
    DeviceError::Failed { device: device.to_owned(), reason: reason.to_string() }
}

/// NVIDIA's driver, as it describes itself.
struct Driver {
    /// The CUDA that it is for, as CUDA counts: 13000 is 13.0.
    version: i32,
    gpus: usize,
}

fn version_name(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Asks the driver, or says why there is none that can be used.
fn driver() -> Result<Driver, String> {
    if !driver_present() {
        return Err("NVIDIA's driver (libcuda.so.1) was not found".into());
    }
    let mut version = 0;
    // SAFETY: an integer to write to.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(show)?;
    if version < DRIVER_VERSION {
        let (found, needed) = (version_name(version), version_name(DRIVER_VERSION));
        return Err(format!(
            "the driver is for CUDA {found}, and {needed} is needed: update the driver"
        ));
    }
    result::init().map_err(show)?;
    let gpus = CudaContext::device_count().map_err(show)?;
    Ok(Driver { version, gpus: usize::try_from(gpus).unwrap_or(0) })
}

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// For example `cuda:0 (NVIDIA H100 80GB HBM3)`.
    pub name: String,
    /// What kernels are compiled for, for example `sm_90a`.
    pub arch: String,
    /// Bytes of its memory that are free.
    pub free: u64,
    /// Bytes of its memory.
    pub total: u64,
}

/// The CUDA that the driver of this machine is for, for example `13.0`, and its GPUs.
///
/// # Errors
/// Why none can be used.
pub fn find() -> Result<(String, Vec<GpuInfo>), DeviceError> {
    let Driver { version, gpus } = driver().map_err(|reason| failed("gpu", reason))?;
    let info = |ordinal| {
        let cuda = Cuda::open(ordinal, Folders::default())?;
        let (free, total) = cuda.memory()?;
        let (name, arch) = (cuda.name.clone(), cuda.arch.clone());
        Ok(GpuInfo { name, arch, free: free as u64, total: total as u64 })
    };
    Ok((version_name(version), (0..gpus).map(info).collect::<Result<_, DeviceError>>()?))
}

/// Errors after which a context gives nothing but errors.
fn is_fatal(error: DriverError) -> bool {
    use sys::CUresult as E;
    matches!(
        error.0,
        E::CUDA_ERROR_ILLEGAL_ADDRESS
            | E::CUDA_ERROR_LAUNCH_FAILED
            | E::CUDA_ERROR_LAUNCH_TIMEOUT
            | E::CUDA_ERROR_ECC_UNCORRECTABLE
            | E::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | E::CUDA_ERROR_HARDWARE_STACK_ERROR
            | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | E::CUDA_ERROR_MISALIGNED_ADDRESS
            | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | E::CUDA_ERROR_INVALID_PC
            | E::CUDA_ERROR_ASSERT
            | E::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | E::CUDA_ERROR_DEVICE_UNAVAILABLE
            | E::CUDA_ERROR_DEINITIALIZED
            | E::CUDA_ERROR_UNKNOWN
    )
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() && self.context.synchronize().is_ok() {
            for at in self.pool.drain() {
                // SAFETY: nobody has them any more, and nothing runs.
                let _ = unsafe { result::free_sync(at) };
            }
        }
    }
}

impl Cuda {
    /// Opens GPU `ordinal`.
    pub fn open(ordinal: usize, folders: Folders) -> Result<Self, DeviceError> {
        let id = format!("cuda:{ordinal}");
        let name = id.clone();
        let fail = |reason: String| failed(&name, reason);
        let Driver { gpus: count, .. } = driver().map_err(fail)?;
        if ordinal >= count {
            return Err(fail(format!("there is no such GPU; found {count}")));
        }
        let open = move || -> Result<Self, DriverError> {
            let context = CudaContext::new(ordinal)?;
            let attribute = |a| context.attribute(a);
            use sys::CUdevice_attribute as A;
            let processors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            let shared = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
            let (major, minor) = context.compute_capability()?;
            // The architecture's own instructions come with the letter.
            let arch = format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" });
            Ok(Self {
                name: format!("{id} ({})", context.name()?),
                stream: context.new_stream()?,
                copies: context.new_stream()?,
                recording: AtomicBool::new(false),
                arch,
                processors: processors.unsigned_abs() as usize,
                shared_max: shared.unsigned_abs(),
                starts_early: major >= 9,
                // Other architectures have another instruction.
                wide: AtomicBool::new(major == 9),
                folders,
                lost: OnceLock::new(),
                pool: Arc::default(),
                modules: Mutex::default(),
                functions: Mutex::default(),
                context,
            })
        };
        open().map_err(|e| fail(show(e)))
    }

    /// Name for people, for example `cuda:0 (NVIDIA H100 80GB HBM3)`.
    pub fn describe(&self) -> &str {
        &self.name
    }

    /// What kernels are compiled for, for example `sm_90a`.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// Multiprocessors.
    pub fn processors(&self) -> usize {
        self.processors
    }

    fn fail(&self, error: DriverError) -> DeviceError {
        self.fail_in("", error)
    }

    /// The same, of a kernel.
    fn fail_in(&self, kernel: &str, error: DriverError) -> DeviceError {
        let within = if kernel.is_empty() { String::new() } else { format!("{kernel}: ") };
        let error_of = failed(&self.name, format!("{within}{}", show(error)));
        if is_fatal(error) {
            // Only the first says what it was.
            let _ = self.lost.set(error_of.to_string());
        }
        error_of
    }

    /// Why nothing more can be computed, once an error has taken the device's context with it.
    pub fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// Bytes of the device's memory that are free, and all.
    pub fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.context.mem_get_info().map_err(|e| self.fail(e))
    }

    /// Makes the device's context this thread's: whoever gives it work does so first.
    fn bind(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(|e| self.fail(e))
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.bind()?;
        // SAFETY: whoever gets the address owns the memory.
        let got = unsafe { result::malloc_sync(bytes) };
        got.or_else(|error| {
            // What the pool keeps may be in the way.
            let kept = self.pool.drain();
            if kept.is_empty() || self.context.synchronize().is_err() {
                return Err(error);
            }
            for at in kept {
                // SAFETY: nobody has them any more, and nothing runs.
                unsafe { result::free_sync(at) }?;
            }
            // SAFETY: as above.
            unsafe { result::malloc_sync(bytes) }
        })
        .map_err(|e| self.no_room(e, bytes))
    }

    /// Room for `len` values, every byte of which is `fill`.
    pub fn filled<T: Pod>(&self, len: usize, fill: u8) -> Result<Dev<T>, DeviceError> {
        let bytes = len * size_of::<T>();
        if bytes == 0 {
            return Ok(Dev::new(None, len));
        }
        let block = Block::new(self.allocate(bytes)?, bytes, self.context.clone());
        let memory = Dev::new(Some(block), len);
        self.fill(&memory, fill)?;
        // Else a copy on the other stream could come before the bytes that it overwrites.
        self.copies.join(&self.stream).map_err(|e| self.fail(e))?;
        Ok(memory)
    }

    /// Room for `len` values that holds anything, from memory that is kept and used again.
    pub fn scratch<T: Pod>(&self, len: usize) -> Result<Dev<T>, DeviceError> {
        let bytes = len * size_of::<T>();
        if bytes == 0 {
            return Ok(Dev::new(None, len));
        }
        let size = Pool::size(bytes);
        let block = match self.pool.take(size, &self.context) {
            Some(block) => block,
            None => self.pool.adopt(self.allocate(size)?, size, &self.context),
        };
        Ok(Dev::new(Some(block), len))
    }

    /// Values in memory that is kept and used again.
    pub fn lend<T: Pod>(&self, values: &[T]) -> Result<Dev<T>, DeviceError> {
        let memory = self.scratch(values.len())?;
        self.copy_in(&memory, 0, values)?;
        Ok(memory)
    }

    /// Room for `bytes` bytes that holds anything, from memory of its own.
    pub fn room(&self, bytes: usize) -> Result<Dev<u8>, DeviceError> {
        if bytes == 0 {
            return Ok(Dev::new(None, 0));
        }
        Ok(Dev::new(Some(Block::new(self.allocate(bytes)?, bytes, self.context.clone())), bytes))
    }

    /// Writes values from value `from` on, in order with the device's work. The driver has read them
    /// when this returns, for they are not in pinned memory.
    fn copy_in<T: Pod>(&self, to: &Dev<T>, from: usize, values: &[T]) -> Result<(), DeviceError> {
        assert!(from + values.len() <= to.len, "values leave the device's buffer");
        if values.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let at = to.at + (from * size_of::<T>()) as u64;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        // SAFETY: inside the buffer, as just seen, and read before this returns.
        unsafe { result::memcpy_htod_async(at, bytes, self.stream.cu_stream()) }
            .map_err(|e| self.fail(e))
    }

    fn no_room(&self, error: DriverError, bytes: usize) -> DeviceError {
        if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return self.fail(error);
        }
        let free = self.memory().map_or(0, |(free, _)| free as u64);
        DeviceError::OutOfMemory { device: self.name.clone(), needed: bytes as u64, free }
    }

    /// Takes values to the device.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Dev<T>, DeviceError> {
        let dev = self.filled(values.len(), 0)?;
        self.write(&dev, 0, values)?;
        Ok(dev)
    }

    /// Writes values from value `from` on; returns when they are there.
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn write<T: Pod>(&self, to: &Dev<T>, from: usize, values: &[T]) -> Result<(), DeviceError> {
        self.copy_in(to, from, values)?;
        self.wait()
    }

    /// The values, when all work before has ended.
    pub fn download<T: Pod>(&self, from: &Dev<T>) -> Result<Vec<T>, DeviceError> {
        let mut values = vec![T::zeroed(); from.len];
        self.bind()?;
        if !values.is_empty() {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
            // SAFETY: both are of the same size, and the copy has ended when this returns.
            unsafe { result::memcpy_dtoh_async(bytes, from.at, self.stream.cu_stream()) }
                .map_err(|e| self.fail(e))?;
        }
        self.wait()?;
        Ok(values)
    }

    /// Fills with a byte.
    pub fn fill<T: Pod>(&self, memory: &Dev<T>, byte: u8) -> Result<(), DeviceError> {
        if memory.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let bytes = memory.len * size_of::<T>();
        // SAFETY: the whole buffer.
        unsafe { result::memset_d8_async(memory.at, byte, bytes, self.stream.cu_stream()) }
            .map_err(|e| self.fail(e))
    }

    /// Waits until all work has ended.
    pub fn wait(&self) -> Result<(), DeviceError> {
        self.stream.synchronize().map_err(|e| self.fail(e))
    }

    /// Milliseconds that the device takes for what `work` gives it.
    pub fn time(&self, work: impl FnOnce() -> Result<(), DeviceError>) -> Result<f32, DeviceError> {
        let event = || -> Result<CudaEvent, DeviceError> {
            let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            self.stream.record_event(flags).map_err(|e| self.fail(e))
        };
        let from = event()?;
        work()?;
        let to = event()?;
        to.synchronize().map_err(|e| self.fail(e))?;
        from.elapsed_ms(&to).map_err(|e| self.fail(e))
    }

    /// Records what `work` gives the device instead of doing it, to be done as often as wanted.
    /// What it launches must be loaded already, and it must not wait, allocate or read. An error if
    /// it gave the device nothing: replaying such a graph was seen to damage the process's memory.
    pub fn capture(
        &self,
        work: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<CudaGraph, DeviceError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        self.stream.begin_capture(mode).map_err(|e| self.fail(e))?;
        self.recording.store(true, Ordering::Relaxed);
        let worked = work();
        self.recording.store(false, Ordering::Relaxed);
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags).map_err(|e| self.fail(e));
        worked?;
        let nothing = || failed(&self.name, "nothing was recorded: a graph needs some work");
        let graph = graph?.ok_or_else(nothing)?;
        let mut nodes = 0;
        // SAFETY: the graph lives; without room for nodes their number is written.
        unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut nodes) }
            .result()
            .map_err(|e| self.fail(e))?;
        if nodes == 0 { Err(nothing()) } else { Ok(graph) }
    }

    /// Does what was recorded.
    pub fn replay(&self, graph: &CudaGraph) -> Result<(), DeviceError> {
        graph.launch().map_err(|e| self.fail(e))
    }

    /// Compiles and loads a source now, rather than at its first use.
    pub fn load(&self, source: Source) -> Result<(), DeviceError> {
        self.module(source).map(drop)
    }

    fn module(&self, source: Source) -> Result<Arc<CudaModule>, DeviceError> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&source) {
            return Ok(module.clone());
        }
        let load = |fresh| -> Result<Result<Arc<CudaModule>, DriverError>, DeviceError> {
            let code = compile::code(source, &self.arch, &self.folders, fresh)
                .map_err(|reason| failed(&self.name, reason))?;
            Ok(self.context.load_module(Ptx::from_binary(code)))
        };
        let module = match load(false)? {
            Ok(module) => module,
            // What was kept may be damaged.
            Err(_) => load(true)?.map_err(|e| self.fail(e))?,
        };
        modules.insert(source, module.clone());
        Ok(module)
    }

    fn function(&self, source: Source, name: &'static str) -> Found {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(&(source, name)) {
            return Ok(function.clone());
        }
        let module = self.module(source)?;
        let ready = || -> Result<CudaFunction, DriverError> {
            let function = module.load_function(name)?;
            let fixed = function.shared_size_bytes()?.unsigned_abs();
            use sys::CUfunction_attribute as A;
            function.set_attribute(
                A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.shared_max.saturating_sub(fixed).cast_signed(),
            )?;
            // One division of cache and shared memory for all: a processor that has to change it
            // must be empty first, and no kernel would start early.
            function.set_attribute(A::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)?;
            Ok(function)
        };
        let function = ready().map_err(|e| self.fail(e))?;
        functions.insert((source, name), function.clone());
        Ok(function)
    }

    /// Gives a kernel to the stream.
    ///
    /// # Safety
    /// The arguments are the kernel's, and what it reads and writes is inside their buffers.
    unsafe fn launch(
        &self,
        source: Source,
        name: &'static str,
        grid: Grid,
        mut args: Args,
    ) -> Result<(), DeviceError> {
        let [x, y, z] = grid.blocks.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        self.bind()?;
        let function = self.function(source, name)?;
        let shared = u32::try_from(grid.shared).unwrap_or(u32::MAX);
        // A kernel may start before the one before it has ended: it waits itself (`begin`).
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(self.starts_early),
        };
        let mut pointers = args.pointers();
        let (function, none) = (function.cu_function(), std::ptr::null_mut());
        // SAFETY: promised by the caller; `args` outlives the call, which copies them.
        unsafe { sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), none) }
            .result()
            .map_err(|e| self.fail_in(name, e))
    }
}

fn show(error: DriverError) -> String {
    match (error.error_name(), error.error_string()) {
        (Ok(name), Ok(text)) => format!("{}: {}", name.to_string_lossy(), text.to_string_lossy()),
        _ => format!("{error:?}"),
    }
}
