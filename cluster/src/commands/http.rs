//! `--http`: the HTTP API beside a coordinator of this process; `lite-llm key`: who may use it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use lite_llm_actors::coordinator::CoordinatorHandle;
use lite_llm_kernels::{kv::KvDType, math::Math};
use lite_llm_runtime::checkpoint::Checkpoint;
use lite_llm_transport::{
    keys::{KeyRights, Keys},
    moment::utc,
};
use serde_json::json;
use tokio_rustls::TlsAcceptor;

use super::{bad_input, default_state};
use crate::{
    cli::{HttpArgs, KeyArgs, KeyCommand},
    http::{HttpOptions, Server, acceptor, fingerprint},
};

/// What clients call a model that is in no folder.
const BUILT_IN: &str = "built-in";

impl HttpArgs {
    /// Checks what can be checked before anything is loaded.
    pub(super) fn check(&self, keys: Option<&Keys>) -> Result<()> {
        self.tls()?;
        let Some(listen) = self.http.filter(|listen| !listen.ip().is_loopback()) else {
            return Ok(());
        };
        let remedy = match keys {
            Some(keys) if !keys.is_empty().map_err(bad_input)? => return Ok(()),
            Some(_) => "make a key first (lite-llm key add NAME), or listen on 127.0.0.1",
            None => "only a coordinator has keys: start one, or listen on 127.0.0.1",
        };
        Err(bad_input(anyhow::anyhow!(
            "--http {listen}: whoever reaches this address, which is not of loopback, could use the \
             model; {remedy}"
        )))
    }

    /// What takes connections in, if they are to be TLS.
    fn tls(&self) -> Result<Option<TlsAcceptor>> {
        match (&self.http_cert, &self.http_key) {
            (Some(certificate), Some(key)) => {
                acceptor(certificate, key).map(Some).map_err(bad_input)
            }
            _ => Ok(None),
        }
    }

    /// Starts the API, if it is wanted, and says where it is.
    pub(super) async fn serve(
        &self,
        model: Option<&Path>,
        (checkpoint, how, context): (&Checkpoint, (KvDType, Math), Option<usize>),
        coordinator: &CoordinatorHandle,
        keys: Option<Arc<Keys>>,
        files: Option<(PathBuf, Duration)>,
    ) -> Result<Option<Server>> {
        let Some(listen) = self.http else { return Ok(None) };
        let named = model.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        let model = self.http_model.clone().or(named).unwrap_or_else(|| BUILT_IN.to_owned());
        let config = checkpoint.config().served(context).map_err(bad_input)?;
        let options = HttpOptions {
            listen,
            model,
            fingerprint: fingerprint(&checkpoint.id(), how, config.context),
            config,
            coordinator: coordinator.clone(),
            keys,
            files,
            expert_bytes: checkpoint.tier_expert_bytes(),
            tls: self.tls()?,
        };
        let name = options.model.clone();
        let server = Server::start(options).await.map_err(bad_input)?;
        let scheme = if self.http_cert.is_some() { "https" } else { "http" };
        say!("http on {scheme}://{}/v1, model {name}", server.address());
        Ok(Some(server))
    }
}

pub(super) fn key(args: KeyArgs, json: bool) -> Result<()> {
    let state = match args.state {
        Some(state) => state,
        None => default_state()?,
    };
    let keys = Keys::open(&state).map_err(bad_input)?;
    match args.what {
        KeyCommand::Add { name, jobs, tokens_per_minute, priority } => {
            let rights = KeyRights { jobs, tokens_per_minute, priority };
            let text = keys.add(&name, rights).map_err(bad_input)?;
            if json {
                say!("{}", json!({ "name": name, "key": text }));
            } else {
                remark!(
                    "the key of {name}, shown this once; a running coordinator takes it at once:"
                );
                say!("{text}");
            }
        }
        KeyCommand::Revoke { name } => {
            keys.revoke(&name).map_err(bad_input)?;
            let none = keys.is_empty().map_err(bad_input)?;
            if json {
                say!("{}", json!({ "name": name, "revoked": true }));
            } else {
                say!("the key of {name} is good no more");
            }
            if none {
                remark!("it was the last: the API asks for no key, and answers to loopback only");
            }
        }
        KeyCommand::List => {
            let keys = keys.all().map_err(bad_input)?;
            if json {
                let line = |key: &lite_llm_transport::keys::Key| {
                    json!({
                        "name": key.name,
                        "made": utc(key.made),
                        "jobs": key.jobs,
                        "tokens_per_minute": key.tokens_per_minute,
                        "priority": key.priority,
                    })
                };
                say!("{}", json!(keys.iter().map(line).collect::<Vec<_>>()));
                return Ok(());
            }
            say!(
                "{:<24} {:<24} {:>8} {:>14} {:>8}",
                "name",
                "made",
                "jobs",
                "tokens/minute",
                "priority"
            );
            for key in keys {
                let jobs = key.jobs.map_or("-".to_owned(), |jobs| jobs.to_string());
                let tokens = key.tokens_per_minute.map_or("-".to_owned(), |n| n.to_string());
                let (name, made, priority) = (key.name, utc(key.made), key.priority);
                say!("{name:<24} {made:<24} {jobs:>8} {tokens:>14} {priority:>8}");
            }
        }
    }
    Ok(())
}
