//! `lite-llm export`.

use anyhow::Result;
use lite_llm_actors::archive;
use lite_llm_runtime::export::{self, Exported, FILE_BYTES};
use serde_json::json;

use super::bad_input;
use crate::{
    cli::ExportArgs,
    progress::{Progress, Unit},
    size::Size,
};

pub(super) async fn export(args: ExportArgs, json: bool) -> Result<()> {
    let ExportArgs { model, out } = args;
    let folder = out.clone();
    // Reading and writing block.
    let exporting = tokio::task::spawn_blocking(move || {
        let checkpoint = archive::open_checkpoint(&model).map_err(bad_input)?;
        let mut progress = Progress::new("export", Unit::Bytes, json);
        let exported = export::export(&checkpoint, &folder, FILE_BYTES, &mut |done, total| {
            progress.update(done, total, "");
        });
        progress.finish();
        exported.map_err(bad_input)
    });
    let Exported { architecture, dtype, bytes, files } = exporting.await??;
    if json {
        let dtype = dtype.to_string();
        say!(
            "{}",
            json!({ "out": out, "architecture": architecture, "dtype": dtype, "bytes": bytes, "files": files })
        );
        return Ok(());
    }
    let shown = out.display();
    say!("{architecture}, {dtype}, {} in {files} files: {shown}", Size(bytes));
    Ok(())
}
