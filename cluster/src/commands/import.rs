//! `lite-llm import`.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use lite_llm_actors::archive::{self, StoreArchive, StoreOptions};
use lite_llm_runtime::{
    checkpoint::{
        codec::{Compression, Packed},
        inspect::Summary,
    },
    import::{self, Destination, ImportOptions},
};
use serde_json::json;

use super::{bad_input, inspect};
use crate::{
    cli::ImportArgs,
    progress::{Progress, Unit},
    size::Size,
};

pub(super) async fn import(args: ImportArgs, json: bool) -> Result<()> {
    let parse = |what: &str, error: &dyn std::fmt::Display| bad_input(anyhow!("{what}: {error}"));
    let tiers = args.tiers.as_deref().map(str::parse).transpose();
    let routes = args.routes.as_deref().map(str::parse).transpose();
    let out = match args.out.to_str() {
        Some(url) if archive::is_url(&args.out) => {
            let store = StoreArchive::open(url, &StoreOptions::from_env()).map_err(bad_input)?;
            Destination::Store(Arc::new(store))
        }
        _ => Destination::Folder(args.out.clone()),
    };
    let source = args.source.clone();
    let opened = match archive::is_url(&source) {
        // Requests block.
        true => Some(tokio::task::spawn_blocking(move || archive::open_checkpoint(&source)).await?),
        false => None,
    };
    let options = ImportOptions {
        source: args.source,
        opened: opened.transpose().map_err(bad_input)?.map(Arc::new),
        out,
        dtype: args.dtype,
        tiers: tiers.map_err(|error| parse("--tiers", &error))?,
        routes: routes.map_err(|error| parse("--routes", &error))?,
        compress: args.compress.map(|level| Compression { level, now: uptime }),
    };
    let compress = options.compress.is_some();
    let started = Instant::now();
    let (summary, packed) = tokio::task::spawn_blocking(move || {
        let mut progress = Progress::new("import", Unit::Bytes, json);
        let summary = import::import_measured(&options, &mut |done, total, what| {
            progress.update(done, total, what);
        });
        progress.finish();
        summary
    })
    .await?
    .map_err(bad_input)?;
    let speeds = compress.then(|| Speeds::of(&packed));
    if json {
        return print_json(&summary, speeds);
    }
    inspect::print(&summary, false)?;
    if let Some(speeds) = speeds {
        say!(
            "zstd         {} of {} experts shrank, {} to {} ({:.3}); a core packs {}/s, unpacks {}/s",
            packed.sections - packed.left,
            packed.sections,
            Size(packed.bytes),
            Size(packed.stored),
            speeds.ratio,
            Size(speeds.packing as u64),
            Size(speeds.unpacking as u64)
        );
    }
    say!("written to {} in {:.1} s", args.out.display(), started.elapsed().as_secs_f64());
    Ok(())
}

/// How well and how fast experts were compressed.
struct Speeds {
    /// Stored bytes of each byte.
    ratio: f64,
    /// Bytes per second of a core.
    packing: f64,
    unpacking: f64,
}

impl Speeds {
    fn of(packed: &Packed) -> Self {
        let per_s = |bytes: u64, time: Duration| bytes as f64 / time.as_secs_f64().max(1e-9);
        Self {
            ratio: packed.stored as f64 / packed.bytes.max(1) as f64,
            packing: per_s(packed.bytes, packed.packing),
            unpacking: per_s(packed.unpacked, packed.unpacking),
        }
    }
}

fn print_json(summary: &Summary, speeds: Option<Speeds>) -> Result<()> {
    let mut summary = serde_json::to_value(summary)?;
    if let (Some(speeds), Some(object)) = (speeds, summary.as_object_mut()) {
        let compression = json!({
            "ratio": speeds.ratio,
            "packing_bytes_per_s": speeds.packing,
            "unpacking_bytes_per_s": speeds.unpacking,
        });
        object.insert("compression".into(), compression);
    }
    say!("{summary}");
    Ok(())
}

/// Time since some moment.
fn uptime() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}
