//! Passes of one shape as recorded graphs: a step of decoding is one call to the driver.

use std::collections::HashMap;

use lite_llm_kernels::{
    cuda::{Cuda, Dev, Graph},
    device::DeviceError,
};

use super::plan::{HostPlan, Layout};

/// Rows of a pass that is recorded, at most.
const ROWS_MAX: usize = 128;

/// Graphs that are kept: the least recently used goes first.
const GRAPHS_MAX: usize = 96;

/// A shape that was seen.
struct Seen {
    graph: Option<Recording>,
    used: u64,
}

/// A pass that can be done again with other contents of its plan.
struct Recording {
    graph: Graph,
    plan: Dev<u32>,
    results: Dev<u32>,
    /// What it uses that somebody might let go of.
    _kept: Dev<u32>,
}

/// See the module's text.
#[derive(Default)]
pub(super) struct Graphs {
    /// By the plan's layout and the address of the cache.
    seen: HashMap<(Layout, u64), Seen>,
    clock: u64,
    /// Recording has failed: the driver cannot do it, or something else is wrong that the work itself
    /// will tell.
    refused: bool,
}

impl Graphs {
    /// Does a pass by its graph, which is recorded when a shape comes for the second time: by then its
    /// kernels are loaded. `work` gives the device the pass for a plan that lies at some memory and
    /// returns where its results will be; `kept` is held as long as the graph. `None` if the pass is to
    /// be done without a graph.
    pub(super) fn run(
        &mut self,
        cuda: &Cuda,
        plan: &HostPlan,
        cache: u64,
        kept: &Dev<u32>,
        work: impl FnOnce(&Dev<u32>) -> Result<Dev<u32>, DeviceError>,
    ) -> Result<Option<Dev<u32>>, DeviceError> {
        if self.refused || !plan.is_step() || plan.layout().rows > ROWS_MAX {
            return Ok(None);
        }
        self.clock += 1;
        let (clock, key) = (self.clock, (plan.layout(), cache));
        let Some(seen) = self.seen.get_mut(&key) else {
            self.make_room();
            self.seen.insert(key, Seen { graph: None, used: clock });
            return Ok(None);
        };
        seen.used = clock;
        if seen.graph.is_none() {
            let memory = cuda.room(size_of_val(plan.words()))?;
            let memory: Dev<u32> = memory.part(0, plan.words().len());
            match cuda.capture(|| work(&memory)) {
                Ok((graph, results)) => {
                    let kept = kept.part(0, kept.len());
                    seen.graph = Some(Recording { graph, plan: memory, results, _kept: kept });
                }
                Err(error) => {
                    tracing::warn!(%error, "passes are not recorded as graphs");
                    self.refused = true;
                    return Ok(None);
                }
            }
        }
        let Some(Recording { graph, plan: memory, results, .. }) = &seen.graph else {
            return Ok(None);
        };
        cuda.put(memory, 0, plan.words())?;
        cuda.replay(graph)?;
        Ok(Some(results.part(0, results.len())))
    }

    /// Never records: a graph has the work of one GPU.
    pub(super) fn refuse(&mut self) {
        self.refused = true;
    }

    fn make_room(&mut self) {
        while self.seen.len() >= GRAPHS_MAX {
            let oldest = self.seen.iter().min_by_key(|(_, seen)| seen.used).map(|(&key, _)| key);
            match oldest {
                Some(key) => self.seen.remove(&key),
                None => return,
            };
        }
    }
}
