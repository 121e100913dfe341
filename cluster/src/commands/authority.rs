//! `lite-llm token` and `lite-llm revoke`: what is changed in a coordinator's state folder while it
//! runs. The coordinator reads the folder's files again when they change.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context, Result};
use lite_llm_transport::{
    identity::{ClusterCa, Role},
    moment::utc,
    secrets::TOKEN_VALIDITY,
    token::JoinToken,
};
use serde_json::json;

use super::{bad_input, default_state};
use crate::{
    cli::{DEFAULT_LISTEN, RevokeArgs, TokenArgs, TokenRole},
    time::Time,
};

/// A coordinator's state folder and the authority in it.
pub(super) fn open_authority(state: Option<PathBuf>) -> Result<(PathBuf, ClusterCa)> {
    let state = match state {
        Some(state) => state,
        None => default_state()?,
    };
    let authority = ClusterCa::open(&state).map_err(bad_input)?;
    Ok((state, authority))
}

pub(super) fn token(args: TokenArgs, json: bool) -> Result<()> {
    let role = match args.role {
        TokenRole::Client => Role::Client,
        TokenRole::Worker => Role::Worker,
    };
    let (state, authority) = open_authority(args.state)?;
    let path = JoinToken::path_in(&state, role);
    let address = match args.advertise {
        Some(address) => address.to_string(),
        // As it was; a state that never had a token gets the address that coordinators have.
        None => JoinToken::read(&path).map_or_else(
            |_| SocketAddr::from(DEFAULT_LISTEN).to_string(),
            |token| token.address().to_owned(),
        ),
    };
    let grace = args.grace.map_or_else(Default::default, |grace| grace.0);
    if args.rotate {
        let validity = args.expires.map_or(TOKEN_VALIDITY, |expires| expires.0);
        authority.rotate(role, validity, grace).map_err(bad_input)?;
    }
    let token = authority.join_token(role, address)?;
    token.write(&path).with_context(|| {
        format!("the token was changed, and its file was not; `lite-llm token {role}` writes it")
    })?;
    let (expires, shown) = (utc(token.expires()), path.display().to_string());
    if json {
        let line = json!({
            "role": role.as_str(),
            "file": shown,
            "coordinator": token.address(),
            "expires": expires,
            "rotated": args.rotate,
        });
        say!("{line}");
        return Ok(());
    }
    say!("token written to {shown}: it makes {role}s of {} until {expires}", token.address());
    match (args.rotate, grace.is_zero()) {
        (false, _) => {}
        (true, true) => say!("older ones let nobody join any more; certificates go on"),
        (true, false) => say!("older ones let others join for {} more", Time(grace)),
    }
    Ok(())
}

pub(super) fn revoke(args: RevokeArgs, json: bool) -> Result<()> {
    let RevokeArgs { name, undo, state } = args;
    let (_, authority) = open_authority(state)?;
    let changed = if undo { authority.undo_revoke(&name) } else { authority.revoke(&name) };
    changed.map_err(bad_input)?;
    if json {
        say!("{}", json!({ "name": name, "revoked": !undo }));
    } else if undo {
        say!("{name} may join again; its old certificates stay refused");
    } else {
        say!(
            "{name} is revoked: its certificates are refused and its connections closed. If it has \
             a token, give that role a new one: lite-llm token worker --rotate"
        );
    }
    Ok(())
}
