//! Experts of an open checkpoint: where their bytes lie, reading them, and making experts of them.
//!
//! Invariant: nothing becomes an expert whose bytes do not have the hash of the index.

use std::path::PathBuf;

use lite_llm_kernels::{buffer::Buffer, matrix::PackedMatrix};

use super::{
    CheckpointError, DATA_ALIGN,
    codec::{read_packed, unpack_section},
    index::{GroupPage, Hash, Section, Shard},
    layout::{expert_bytes, expert_position, expert_tensors},
    reader::{Checkpoint, check_section, split, to_matrix},
    source::Files,
};
use crate::expert::{ExpertKey, GatedMlp};

/// Where an expert's bytes lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertPlace {
    /// The shard's path within the checkpoint.
    pub path: String,
    /// The shard in the local file system, if the bytes lie there as they are used. Who opens it
    /// asks for its real path.
    pub file: Option<PathBuf>,
    /// Where they begin, a multiple of 4 KiB.
    pub offset: u64,
    /// How many they are.
    pub bytes: u64,
}

impl Checkpoint {
    /// The weights of one expert: three matrices, one after the other in the same memory.
    pub fn expert(&self, key: ExpertKey) -> Result<GatedMlp, CheckpointError> {
        let page = self.page(key.tier as usize, key.group)?;
        let (shard, section) = self.expert_section(&page, key)?;
        let whole = self.section_bytes(shard, section)?;
        self.expert_of(shard, section, key, &whole)
    }

    /// Where an expert's bytes lie. Reads the index of its group, if that was not needed before.
    pub fn expert_place(&self, key: ExpertKey) -> Result<ExpertPlace, CheckpointError> {
        let page = self.page(key.tier as usize, key.group)?;
        let (shard, section) = self.expert_section(&page, key)?;
        let file = match self.files() {
            Files::Dir(dir) if section.stored.is_none() => Some(dir.join(&shard.path)),
            _ => None,
        };
        let (offset, bytes) = (section.offset, section.bytes);
        Ok(ExpertPlace { path: shard.path.clone(), file, offset, bytes })
    }

    /// Whether its files lie in a local folder.
    pub fn is_local(&self) -> bool {
        matches!(self.files(), Files::Dir(_))
    }

    /// Whether its files lie in an object store.
    pub fn is_stored(&self) -> bool {
        matches!(self.files(), Files::Archive(_))
    }

    /// Where a path within a local folder leads, to a regular file below that folder.
    pub(crate) fn real_path(&self, path: &str) -> Result<PathBuf, CheckpointError> {
        self.files().real_path(path)
    }

    /// Reads an expert's bytes, unverified, into memory of their size: what
    /// [`Checkpoint::expert_from`] makes an expert of.
    pub fn read_expert(&self, key: ExpertKey, out: &mut [u8]) -> Result<(), CheckpointError> {
        let page = self.page(key.tier as usize, key.group)?;
        let (shard, section) = self.expert_section(&page, key)?;
        let file = self.files().open_sized(&shard.path, shard.bytes)?;
        match &section.stored {
            Some(stored) => {
                let packed = read_packed(shard, section, stored, &file)?;
                unpack_section(shard, section, &packed, out)
            }
            None => file.read_into(&shard.path, section.offset, out),
        }
    }

    /// An expert of its bytes, verified before their memory is shared: if they are not what they
    /// should be, it is given back.
    pub fn expert_from<M>(
        &self,
        key: ExpertKey,
        memory: M,
    ) -> Result<GatedMlp, (CheckpointError, Option<M>)>
    where
        M: AsRef<[u8]> + Send + Sync + 'static,
    {
        let page = match self.page(key.tier as usize, key.group) {
            Ok(page) => page,
            Err(error) => return Err((error, Some(memory))),
        };
        let checked = self.expert_section(&page, key).and_then(|(shard, section)| {
            check_section(shard, section, Hash::of(memory.as_ref()))?;
            Ok((shard, section))
        });
        let (shard, section) = match checked {
            Ok(found) => found,
            Err(error) => return Err((error, Some(memory))),
        };
        let made = Buffer::from_owner(memory)
            .map_err(|error| CheckpointError::malformed(&shard.path, error.to_string()))
            .and_then(|bytes| self.expert_of(shard, section, key, &bytes));
        made.map_err(|error| (error, None))
    }

    /// Bytes that an expert takes, from the configuration alone.
    pub fn expert_bytes(&self, key: ExpertKey) -> Result<u64, CheckpointError> {
        let tier = self.moe()?.tiers.get(usize::from(key.tier));
        let there = tier.is_some_and(|t| key.group < t.groups && key.expert < t.experts_per_group);
        match there && self.config().sparse_layers().any(|layer| layer == usize::from(key.layer)) {
            true => Ok(expert_bytes(self.config(), self.dtype(), key.tier.into())),
            false => Err(self.absent(key.to_string())),
        }
    }

    /// Bytes of an expert, by tier.
    pub fn tier_expert_bytes(&self) -> Vec<u64> {
        let tiers = self.config().moe.as_ref().map_or(0, |moe| moe.tiers.len());
        (0..tiers).map(|tier| expert_bytes(self.config(), self.dtype(), tier)).collect()
    }

    /// Bytes of all experts that are there, as they lie in memory.
    pub fn all_expert_bytes(&self) -> u64 {
        let bytes = self.tier_expert_bytes();
        let slot = |key: ExpertKey| bytes[usize::from(key.tier)].next_multiple_of(DATA_ALIGN);
        self.config().expert_keys().map(slot).sum()
    }

    fn expert_section<'a>(
        &self,
        page: &'a GroupPage,
        key: ExpertKey,
    ) -> Result<(&'a Shard, &'a Section), CheckpointError> {
        let shard = self.layer_shard(page, key.layer as usize)?;
        let section = shard.sections.get(expert_position(key.expert));
        Ok((shard, section.ok_or_else(|| self.absent(key.to_string()))?))
    }

    /// An expert of a section's bytes: three matrices, one after the other.
    fn expert_of(
        &self,
        shard: &Shard,
        section: &Section,
        key: ExpertKey,
        whole: &Buffer,
    ) -> Result<GatedMlp, CheckpointError> {
        let specs = expert_tensors(self.config(), self.dtype(), key.tier.into(), &section.name);
        let mut matrices = Vec::with_capacity(specs.len());
        for (spec, bytes) in specs.iter().zip(split(shard, whole, &specs)?) {
            matrices.push(to_matrix(shard, spec, bytes)?);
        }
        let Ok([gate, up, down]) = <[PackedMatrix; 3]>::try_from(matrices) else {
            unreachable!("an expert is three matrices");
        };
        Ok(GatedMlp { gate, up, down })
    }
}
