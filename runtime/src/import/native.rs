//! Conversion: a checkpoint becomes one of another format.
//!
//! Tokenizer, chat template, tiers and routing stay as they are. Every tensor is verified, widened
//! to f32, which is exact from every format, and packed again; tensors whose format stays are
//! copied. So a checkpoint that was imported without rounding converts to the same bytes, root
//! hash and all, as its source imports to. Compressing one, or bringing it into an object store,
//! keeps its formats unless another is asked for. A conversion that would change nothing is refused.

use std::{path::Path, sync::Arc};

use lite_llm_kernels::matrix::{PANEL, PackedMatrix, Source};

use super::{
    Destination, ImportError, ImportOptions, PIECE_BYTES, not_finite,
    pack::{NotFinite, Packer},
};
use crate::checkpoint::{
    Checkpoint, Tensor,
    codec::Packed,
    index::Shard,
    inspect::{Summary, inspect},
    layout::{Part, TensorSpec},
    source::Files,
    writer::{TensorSink, Text},
};

/// Whether a folder is a checkpoint and no Hugging Face folder.
pub(super) fn is_checkpoint(options: &ImportOptions) -> bool {
    if options.opened.is_some() {
        return true;
    }
    let source = &options.source;
    let numbered = source.to_str().and_then(|text| text.rsplit_once('@'));
    let dir = match numbered {
        Some((dir, number)) if !source.exists() && number.parse::<u64>().is_ok() => Path::new(dir),
        _ => source,
    };
    let checkpoint = Files::dir(dir).and_then(|files| files.holds_checkpoint()).unwrap_or(false);
    checkpoint && !dir.join("config.json").exists()
}

/// Whether a conversion that keeps the format of weights changes something else.
fn moves(options: &ImportOptions) -> bool {
    options.compress.is_some() || matches!(options.out, Destination::Store(_))
}

/// Converts a checkpoint. `progress` is as for an import.
pub(super) fn convert(
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64, u64, &str),
) -> Result<(Summary, Packed), ImportError> {
    let tiers = options.tiers.as_ref().map(|cut| ("--tiers", &cut.text));
    let routes = options.routes.as_ref().map(|routes| ("--routes", &routes.text));
    if let Some((option, text)) = tiers.or(routes) {
        return Err(ImportError::Cut {
            option,
            text: text.clone(),
            reason: "a checkpoint keeps its tiers when it is converted; cut the Hugging Face \
                     folder while importing it"
                .into(),
        });
    }
    let checkpoint = match &options.opened {
        Some(checkpoint) => checkpoint.clone(),
        None => Arc::new(Checkpoint::open(&options.source)?),
    };
    let dtype = match options.dtype {
        Some(dtype) if dtype != checkpoint.dtype() => dtype,
        _ if moves(options) || inspect(&checkpoint)?.compressed.is_some() => checkpoint.dtype(),
        _ => {
            return Err(ImportError::file(
                &options.source,
                format!("a checkpoint in {} already", checkpoint.dtype()),
                "name another format with --dtype, compress it with --compress, or copy it",
            ));
        }
    };
    let mut config = checkpoint.config().clone();
    for tier in config.moe.iter_mut().flat_map(|moe| &mut moe.tiers) {
        // A format that was asked for is one for all.
        if options.dtype.is_some() {
            tier.dtype = None;
        }
        if tier.absent {
            return Err(ImportError::file(
                &options.source,
                format!("the files of tier {} are missing", tier.id),
                "copy them there to convert all of the checkpoint",
            ));
        }
    }
    let config = &config;
    let text = Text {
        tokenizer_json: checkpoint.tokenizer_json()?,
        chat_template: checkpoint.chat_template()?,
        special_tokens: checkpoint.manifest().text.special_tokens.clone(),
    };
    let mut total = 0;
    for part in Part::all(config) {
        total += checkpoint.shard(part)?.bytes;
    }
    let mut writer = options.writer(config, dtype)?;
    let mut converter = Converter { packer: Packer::new(), rows: vec![] };
    let mut done = 0;
    for part in Part::all(config) {
        let shard = checkpoint.shard(part)?;
        if writer.is_written(part)? {
            done += shard.bytes;
            continue;
        }
        let sections = part.sections(checkpoint.config(), checkpoint.dtype());
        let mut sections = shard.sections.iter().zip(sections);
        let mut tensors = Vec::new().into_iter();
        writer.write_part(part, |spec, sink| {
            // Names and order do not depend on the format.
            if tensors.len() == 0
                && let Some((section, spec)) = sections.next()
            {
                progress(done, total, &shard.path);
                done += section.bytes;
                tensors = checkpoint.tensors(&shard, section, &spec.tensors)?.into_iter();
            }
            let tensor = tensors.next().expect("every part has the same tensors in every format");
            converter.tensor(&shard, spec, &tensor, sink)
        })?;
        done += shard.header_bytes;
    }
    progress(total, total, "the manifest");
    let packed = writer.packed();
    writer.finish(&text)?;
    Ok((inspect(&options.open()?)?, packed))
}

/// Buffers that are used again.
struct Converter {
    packer: Packer,
    rows: Vec<f32>,
}

impl Converter {
    fn tensor(
        &mut self,
        shard: &Shard,
        spec: &TensorSpec,
        tensor: &Tensor,
        sink: &mut TensorSink<'_>,
    ) -> Result<(), ImportError> {
        match tensor {
            Tensor::Vector(values) => Ok(sink.write(bytemuck::cast_slice(values))?),
            Tensor::Matrix(matrix) if matrix.dtype() == spec.dtype => {
                Ok(sink.write(matrix.data())?)
            }
            Tensor::Matrix(matrix) => self.matrix(shard, spec, matrix, sink),
        }
    }

    fn matrix(
        &mut self,
        shard: &Shard,
        spec: &TensorSpec,
        matrix: &PackedMatrix,
        sink: &mut TensorSink<'_>,
    ) -> Result<(), ImportError> {
        let (n, k) = (matrix.n(), matrix.k());
        let rows = (PIECE_BYTES / (4 * k).max(1) / PANEL).max(1) * PANEL;
        for from in (0..n).step_by(rows) {
            let rows = rows.min(n - from);
            self.rows.resize(rows * k, 0.0);
            widen(matrix, from, &mut self.rows, self.packer.threads());
            let source = Source::F32(&self.rows);
            let packed = self.packer.pack(spec.dtype, rows, k, source).map_err(|at| {
                let at = NotFinite { row: from + at.row, ..at };
                not_finite(shard.path.clone(), spec.name.clone(), at)
            })?;
            sink.write(packed)?;
        }
        Ok(())
    }
}

/// The rows of a matrix from one on, as f32.
fn widen(matrix: &PackedMatrix, from: usize, rows: &mut [f32], threads: usize) {
    let k = matrix.k();
    let share = (rows.len() / k).div_ceil(threads).max(PANEL) * k;
    std::thread::scope(|scope| {
        for (i, part) in rows.chunks_mut(share).enumerate() {
            scope.spawn(move || {
                for (j, row) in part.chunks_mut(k).enumerate() {
                    matrix.row(from + i * (share / k) + j, row);
                }
            });
        }
    });
}
