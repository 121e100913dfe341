//! `lite-llm coordinator`.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use lite_llm_actors::{
    archive,
    coordinator::{CoordinatorHandle, CoordinatorOptions},
    ledger::{Keep, LedgerOptions},
};
use lite_llm_transport::{
    identity::{ClusterCa, Role},
    keys::Keys,
    messages::ClusterStatus,
    moment::utc,
    state::StateDir,
    token::JoinToken,
};

use super::{bad_input, default_state, interrupted, open_model, placement};
use crate::{
    cli::{CoordinatorArgs, KeepJobs},
    time::Time,
};

/// How often the state is looked at, to say what changed.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// How often a wait is mentioned again.
const REMIND_INTERVAL: Duration = Duration::from_secs(10);

/// The ledger's file in the state folder.
const LEDGER_FILE: &str = "jobs.redb";
/// The folder of what is uploaded for batches.
const FILES_FOLDER: &str = "files";

/// How long results are kept: as was said, and for the rest as by default.
fn keep(said: Option<KeepJobs>) -> Keep {
    let default = Keep::default();
    match said {
        None => default,
        Some(KeepJobs::Time(Time(time))) => Keep { time, ..default },
        Some(KeepJobs::Count(jobs)) => Keep { jobs, ..default },
    }
}

pub(super) async fn coordinator(args: CoordinatorArgs) -> Result<()> {
    // Workers open the same path, wherever they were started.
    let model = match archive::is_url(&args.model) {
        true => args.model.clone(),
        false => std::path::absolute(&args.model)
            .with_context(|| format!("{}: no such path", args.model.display()))?,
    };
    let checkpoint = open_model(Some(&model))?;
    checkpoint.config().served(args.context).map_err(bad_input)?;
    let state = match args.state {
        Some(state) => state,
        None => default_state()?,
    };
    if args.listen.ip().is_unspecified() && args.advertise.is_none() {
        let listen = args.listen;
        return Err(bad_input(anyhow::anyhow!(
            "--listen {listen} is every address of this machine; say with --advertise ADDR which \
             one workers are to use"
        )));
    }
    // Held until this process ends: two coordinators of one state would overwrite each other's
    // tokens.
    let _only = StateDir::open_or_create(&state).map_err(bad_input)?.lock_coordinator()?;
    let authority = Arc::new(ClusterCa::open_or_create(&state).map_err(bad_input)?);
    let keys = Arc::new(Keys::open(&state).map_err(bad_input)?);
    args.http.check(Some(&keys))?;
    let options = CoordinatorOptions {
        listen: args.listen,
        authority: authority.clone(),
        checkpoint: checkpoint.clone(),
        workers: args.workers.into(),
        placement: placement(args.random_placement),
        kv_dtype: args.kv_dtype,
        math: args.math,
        context: args.context,
        remote_workers: true,
        replicas: args.replicas,
        patience: args.patience.0,
        ledger: Some(LedgerOptions { file: state.join(LEDGER_FILE), keep: keep(args.keep_jobs) }),
        client_priority: args.client_priority,
    };
    let coordinator = CoordinatorHandle::start(options).await?;
    let address = args.advertise.unwrap_or(coordinator.address());
    let mut tokens = Vec::new();
    for role in [Role::Worker, Role::Client] {
        let (token, path) =
            (authority.join_token(role, address.to_string())?, JoinToken::path_in(&state, role));
        token.write(&path)?;
        if token.expires() <= SystemTime::now() {
            remark!(
                "the token that makes {role}s expired at {}; make a new one: lite-llm token {role} \
                 --rotate",
                utc(token.expires())
            );
        }
        tokens.push(path.display().to_string());
    }
    say!("coordinator on {}, model {}", coordinator.address(), model.display());
    say!("tokens written to {} and {}", tokens[0], tokens[1]);
    say!("start a worker:  lite-llm worker --join {address} --token {}", tokens[0]);
    say!("ask it:          lite-llm submit --token {} \"…\"", tokens[1]);
    let files = (state.join(FILES_FOLDER), keep(args.keep_jobs).time);
    let served = (&*checkpoint, (args.kv_dtype, args.math), args.context);
    let http = args.http.serve(Some(&model), served, &coordinator, Some(keys), Some(files)).await?;
    let watched = coordinator.clone();
    let ledger = coordinator.jobs().cloned();
    let ledger_ended = async {
        match ledger {
            Some(jobs) => jobs.ended().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = ledger_ended => {
            coordinator.stop().await;
            anyhow::bail!(
                "the ledger's thread died; what it logged says why. Start the coordinator again: what \
                 was accepted is on disk"
            );
        }
        () = watch(watched) => {
            coordinator.stop().await;
            anyhow::bail!(
                "the coordinator's actor died; what it logged says why. Workers and clients will \
                 not reach this process any more: start it again"
            );
        }
        () = interrupted() => {}
    }
    say!("stopping");
    if let Some(http) = http {
        http.stop().await;
    }
    coordinator.stop().await;
    Ok(())
}

/// Says whom the coordinator waits for, and how far they are, whenever it changes. Ends only if the
/// coordinator's actor is gone.
async fn watch(coordinator: CoordinatorHandle) {
    let mut last = String::new();
    let mut said = tokio::time::Instant::now();
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    loop {
        ticks.tick().await;
        let Ok(status) = coordinator.status().await else { return };
        let line = line(&status);
        let settled = status.waiting_for.is_empty();
        if line != last || (!settled && said.elapsed() >= REMIND_INTERVAL) {
            say!("{line}");
            last = line;
            said = tokio::time::Instant::now();
        }
    }
}

fn line(status: &ClusterStatus) -> String {
    let names: Vec<&str> = status.nodes.iter().map(|node| node.name.as_str()).collect();
    let here = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
    match status.waiting_for.is_empty() {
        true => format!("{}: {here}", status.state),
        false => {
            let loading: Vec<String> = status
                .nodes
                .iter()
                .filter(|node| node.loaded < node.total)
                .map(|node| format!("{} {}/{} experts", node.name, node.loaded, node.total))
                .collect();
            let progress = match loading.is_empty() {
                true => String::new(),
                false => format!(" ({})", loading.join(", ")),
            };
            let waiting = status.waiting_for.join(", ");
            format!("{}: {waiting}; here: {here}{progress}", status.state)
        }
    }
}
