//! How a device takes a pass through several layers without coming back to the host.

use lite_llm_kernels::device::{Device, DeviceError, Draw};

use super::{Chunk, Tensors};
use crate::backbone::Backbone;

/// How a device carries passes through several layers without coming back to the host.
pub trait Carrier<D: Device>: Send + Sync {
    /// What it needs for a pass, taken to the device once; `None` if it cannot carry this one. With
    /// `draws` nothing but a token of each row whose logits are wanted is asked for.
    fn begin(
        &self,
        backbone: &Backbone<D>,
        chunks: &[Chunk],
        draws: Option<&[Draw]>,
    ) -> Result<Option<Box<dyn Carried<D>>>, DeviceError>;
}

/// A pass that is carried.
pub trait Carried<D: Device>: Send {
    /// Whether it takes the pass from its tokens to the next ones, [`Reached::Tokens`], and needs none of
    /// `tensors` for that.
    fn is_whole(&self) -> bool {
        false
    }

    /// Goes on from the beginning of `layer`, as far as it can: `tensors.x` is the residual stream
    /// before and after.
    fn carry(
        &mut self,
        backbone: &Backbone<D>,
        layer: usize,
        tensors: &mut Tensors<D>,
        arena: &mut D::KvArena,
    ) -> Result<Reached, DeviceError>;
}

/// Where a carried pass has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reached {
    /// The tokens that were chosen of the rows whose logits are wanted.
    Tokens(Vec<u32>),
    /// The end of the layers.
    End,
    /// This layer's attention was added and `tensors.normed` is what its gates read, but its experts
    /// are not all here.
    Experts {
        /// Which layer.
        layer: usize,
    },
    /// A number that is not finite: the pass must be taken layer by layer, from the first, to say
    /// whose it is.
    NotFinite,
}
