//! `import`, and what `inspect` and `verify` look at.

use std::path::PathBuf;

use clap::Args;
use lite_llm_runtime::checkpoint::codec;

/// `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Checkpoint: a folder or URL. Of one tier with one group, as transformers' classes know it.
    #[arg(value_name = "DIR|URL")]
    pub model: PathBuf,
    /// Folder to write, which is not there yet.
    #[arg(value_name = "HF_DIR")]
    pub out: PathBuf,
}

/// `import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Hugging Face folder (config.json, safetensors, tokenizer.json), GGUF file (F32, BF16, F16,
    /// Q8_0, Q4_0), or a checkpoint to convert: a folder or URL. One that is compressed and is
    /// imported without --compress is unpacked.
    pub source: PathBuf,
    /// Folder or URL to write to: new or empty. s3://, gs://, az:// and file:// can be written to.
    #[arg(value_name = "OUT_DIR|URL")]
    pub out: PathBuf,
    /// Weight format: f32, bf16, int8, int6 or int4 [default: the source's own].
    #[arg(long)]
    pub dtype: Option<lite_llm_kernels::dtype::DType>,
    /// Cut the experts into tiers, in order: NAME:GROUPSxEXPERTS each, then if they are not the
    /// model's the format and the routes, for example tier_1b:2x4,tier_10b:1x8:int4:k1x2.
    #[arg(long, value_name = "CUT")]
    pub tiers: Option<String>,
    /// With --tiers: how many tiers x groups x experts a token goes to, for example 1x1x2.
    #[arg(long, value_name = "TxGxE", requires = "tiers")]
    pub routes: Option<String>,
    /// Compress experts with zstd, at this level (1 to 19). Never changes a result; bf16 and f32
    /// shrink to about three quarters, int8, int6 and int4 hardly.
    #[arg(
        long,
        value_name = "LEVEL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "1",
        value_parser = compression_level
    )]
    pub compress: Option<i32>,
}

/// A checkpoint.
#[derive(Debug, Args)]
pub struct ModelPath {
    /// Checkpoint folder or URL (s3://, gs://, az://, http://, https://, file://), with @N for an
    /// earlier manifest.
    #[arg(value_name = "DIR|URL")]
    pub dir: PathBuf,
}

fn compression_level(text: &str) -> Result<i32, String> {
    let level = text.parse().ok().filter(|level| codec::LEVELS.contains(level));
    let (least, most) = (codec::LEVELS.start(), codec::LEVELS.end());
    level.ok_or_else(|| format!("{least} to {most} is expected"))
}
