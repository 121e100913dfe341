//! Gradients of all parameters, as nodes of rule 8's tree over the rows of the global batch.

use lite_llm_kernels::{cpu::Cpu, ops::elementwise};

use super::{
    bytes::{Damaged, Reader, Writer},
    params::{ParamId, Params},
};

/// Gradients of one node over rows. A parameter that no token reached has none: it is not zero, it is
/// left out.
#[derive(Debug, Default)]
pub struct Gradients {
    list: Vec<Option<Vec<f32>>>,
}

impl Gradients {
    /// Room for so many parameters.
    pub(super) fn new(parameters: usize) -> Self {
        Self { list: (0..parameters).map(|_| None).collect() }
    }

    /// The gradient of a parameter, in its shape, if a token reached it.
    pub fn get(&self, id: ParamId) -> Option<&[f32]> {
        self.list.get(id).and_then(|g| g.as_deref())
    }

    pub(super) fn set(&mut self, id: ParamId, gradient: Vec<f32>) {
        self.list[id] = Some(gradient);
    }

    /// Adds the sides of a node: earlier + later.
    pub(super) fn meet(mut self, cpu: &Cpu, later: Self) -> Self {
        for (earlier, later) in self.list.iter_mut().zip(later.list) {
            match (earlier.as_mut(), later) {
                (Some(sum), Some(later)) => {
                    elementwise::add(cpu, sum, &later);
                    cpu.give(later);
                }
                (None, Some(later)) => *earlier = Some(later),
                (_, None) => {}
            }
        }
        self
    }

    /// Moves what `from` holds to what `to` holds: `to + from`.
    pub(super) fn fold_into(&mut self, cpu: &Cpu, from: ParamId, to: ParamId) {
        let Some(more) = self.list.get_mut(from).and_then(Option::take) else { return };
        match &mut self.list[to] {
            Some(sum) => {
                elementwise::add(cpu, sum, &more);
                cpu.give(more);
            }
            none => *none = Some(more),
        }
    }

    /// Appends all of it.
    pub(super) fn write(&self, to: &mut Writer) {
        to.number(self.list.len());
        for gradient in &self.list {
            to.flags(&[gradient.is_some()]);
            if let Some(gradient) = gradient {
                to.f32s(gradient);
            }
        }
    }

    /// Takes what [`Gradients::write`] has appended: one for each parameter, and one more for the embedding.
    pub(super) fn read(from: &mut Reader<'_>, params: &Params) -> Result<Self, Damaged> {
        let sizes = params.list().iter().map(|param| param.values().len());
        let embed = params.values(params.ids().embed).len();
        let mut list = Vec::with_capacity(params.list().len() + 1);
        if from.count(1)? != params.list().len() + 1 {
            return Err(Damaged);
        }
        for size in sizes.chain([embed]) {
            let gradient = match from.flags()?[..] {
                [true] => Some(from.f32s()?),
                _ => None,
            };
            if gradient.as_ref().is_some_and(|gradient| gradient.len() != size) {
                return Err(Damaged);
            }
            list.push(gradient);
        }
        Ok(Self { list })
    }

    /// Gives the memory back to who computes, to be used again.
    pub fn recycle(self, cpu: &Cpu) {
        self.list.into_iter().flatten().for_each(|gradient| cpu.give(gradient));
    }

    /// Takes a gradient out.
    pub fn take(&mut self, id: ParamId) -> Option<Vec<f32>> {
        self.list.get_mut(id).and_then(Option::take)
    }
}
