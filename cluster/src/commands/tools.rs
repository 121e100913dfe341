//! `lite-llm config`, `completions` and `man`: what describes this program itself.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::CommandFactory;
use serde_json::json;

use super::bad_input;
use crate::cli::{Cli, CompletionsArgs, ConfigArgs, ConfigRole, ManArgs, Settings};

pub(super) fn config(args: ConfigArgs, file: Option<PathBuf>, json: bool) -> Result<()> {
    // What stands after the command's name belongs to it, but is meant for this one.
    let (mut flags, mut json, mut file) = (Vec::new(), json, file);
    let mut words = args.flags.into_iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--json" => json = true,
            "--config" => file = words.next().map(PathBuf::from),
            _ => flags.push(word),
        }
    }
    let settings = Settings::load(file.as_deref()).map_err(bad_input)?;
    let roles = match args.role {
        Some(ConfigRole::Coordinator) => &["coordinator"][..],
        Some(ConfigRole::Worker) => &["worker"],
        None => &["coordinator", "worker"],
    };
    if !json {
        match settings.file() {
            Some(file) => say!("file  {}", file.display()),
            None => say!("file  none (no lite-llm.toml here, none in /etc/lite-llm)"),
        }
    }
    for role in roles {
        let all = settings.in_force(role, &flags).map_err(bad_input)?;
        if !json {
            say!("\n[{role}]");
        }
        for setting in all {
            let (flag, origin) = (&setting.flag, &setting.origin);
            if json {
                let value = &setting.value;
                say!(
                    "{}",
                    json!({ "command": role, "setting": flag, "value": value, "from": origin })
                );
            } else {
                let value = setting.value.as_deref().unwrap_or("-");
                say!("{flag:<18} {value:<34} {origin}");
            }
        }
    }
    Ok(())
}

pub(super) fn completions(args: CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "lite-llm", &mut script);
    crate::output::show(format_args!("{}", String::from_utf8_lossy(&script)));
    Ok(())
}

pub(super) fn man(args: ManArgs) -> Result<()> {
    let Some(folder) = args.out else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut page)?;
        crate::output::show(format_args!("{}", String::from_utf8_lossy(&page)));
        return Ok(());
    };
    let shown = folder.display();
    std::fs::create_dir_all(&folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), &folder))
        .with_context(|| format!("{shown}: cannot write"))
        .map_err(bad_input)?;
    say!("man pages written to {shown}");
    Ok(())
}
