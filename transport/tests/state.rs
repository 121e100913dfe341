//! The state folder: who may touch it, one coordinator at a time, and what earlier releases left.
#![cfg(unix)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use lite_llm_transport::{
    identity::{ClusterCa, Role},
    state::StateDir,
    token::JoinToken,
};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A state with all files that a coordinator has.
fn whole() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let ca = ClusterCa::open_or_create(&state).unwrap();
    for role in [Role::Client, Role::Worker] {
        let token = ca.join_token(role, "127.0.0.1:7450").unwrap();
        token.write(&JoinToken::path_in(&state, role)).unwrap();
    }
    ca.revoke("w1").unwrap();
    (folder, state)
}

#[test]
fn a_folder_and_all_its_files_are_made_for_their_owner_only() {
    let (_folder, state) = whole();
    assert_eq!(mode(&state), 0o700);
    let lock = StateDir::open(&state).unwrap().lock_coordinator().unwrap();
    let mut names = Vec::new();
    for entry in fs::read_dir(&state).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    names.sort();
    let expected = "client.token cluster-ca.pem coordinator.lock edit.lock join-secrets revoked \
                    worker.token";
    assert_eq!(names.join(" "), expected);
    drop(lock);
}

#[test]
fn what_others_could_read_or_replace_is_refused_with_what_to_do() {
    let (_folder, state) = whole();
    for open in [0o777, 0o770, 0o702, 0o1777] {
        chmod(&state, open);
        let error = ClusterCa::open_or_create(&state).unwrap_err().to_string();
        assert!(error.contains("chmod 700") && error.contains("state"), "{error}");
    }
    // A folder that others may look into is fine as long as its files are not.
    chmod(&state, 0o755);
    ClusterCa::open_or_create(&state).unwrap();
    for name in ["cluster-ca.pem", "join-secrets", "revoked", "client.token", "worker.token"] {
        let path = state.join(name);
        for exposed in [0o644, 0o640, 0o620] {
            chmod(&path, exposed);
            let error = ClusterCa::open_or_create(&state).unwrap_err().to_string();
            let words = [name, &format!("{exposed:o}"), "chmod 600"];
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        chmod(&path, 0o600);
    }
    ClusterCa::open(&state).unwrap();
    let file = state.join("cluster-ca.pem");
    let error = StateDir::open(&file).unwrap_err().to_string();
    assert!(error.contains("no folder"), "{error}");
    let nothing = state.join("other");
    assert!(ClusterCa::open(&nothing).is_err());
    fs::create_dir(&nothing).unwrap();
    let error = ClusterCa::open(&nothing).unwrap_err().to_string();
    assert!(error.contains("holds no cluster") && error.contains("--state"), "{error}");
}

#[test]
fn a_token_that_others_can_read_is_not_used() {
    let (_folder, state) = whole();
    let path = JoinToken::path_in(&state, Role::Client);
    assert_eq!(JoinToken::read(&path).unwrap().role(), Role::Client);
    chmod(&path, 0o644);
    let error = JoinToken::read(&path).unwrap_err().to_string();
    assert!(error.contains("client.token") && error.contains("chmod 600"), "{error}");
}

#[test]
fn a_second_coordinator_is_told_who_the_first_is() {
    let (_folder, state) = whole();
    let first = StateDir::open(&state).unwrap().lock_coordinator().unwrap();
    let error = StateDir::open(&state).unwrap().lock_coordinator().unwrap_err().to_string();
    let pid = format!("process {}", std::process::id());
    assert!(error.contains(&pid) && error.contains("--state"), "{error}");
    drop(first);
    StateDir::open(&state).unwrap().lock_coordinator().unwrap();
}

#[test]
fn changes_from_many_processes_are_all_kept_and_seen_by_one_that_runs() {
    let (_folder, state) = whole();
    let running = ClusterCa::open(&state).unwrap();
    let before = running.join_token(Role::Worker, "").unwrap();
    std::thread::scope(|scope| {
        for i in 0..8 {
            let other = ClusterCa::open(&state).unwrap();
            scope.spawn(move || {
                other.revoke(&format!("many-{i}")).unwrap();
                other.rotate(Role::Worker, DAY, DAY).unwrap();
            });
        }
    });
    let names = fs::read_to_string(state.join("revoked")).unwrap();
    assert_eq!(names.lines().filter(|line| line.contains("barred")).count(), 9, "{names}");
    let after = running.join_token(Role::Worker, "").unwrap();
    assert_ne!(format!("{:?}", before.expires()), format!("{:?}", after.expires()));
    assert!(fs::read_dir(&state).unwrap().all(|entry| {
        let name = entry.unwrap().file_name();
        !name.to_str().unwrap().ends_with(".new")
    }));
    // Damage is an error that names the file and says what follows from removing it.
    for (name, then) in [("join-secrets", "new tokens"), ("revoked", "nobody is revoked")] {
        let path = state.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, "damaged").unwrap();
        let error = ClusterCa::open(&state).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(then), "{error}");
        fs::write(&path, whole).unwrap();
    }
    for name in ["W1", "", "a b", "coordinator/x"] {
        assert!(running.revoke(name).is_err(), "{name:?}");
    }
}

#[test]
fn the_authority_of_an_earlier_release_goes_on_and_its_one_token_does_not() {
    let (_folder, state) = whole();
    let path = state.join("cluster-ca.pem");
    let cluster = ClusterCa::open(&state).unwrap().cluster();
    let text = fs::read_to_string(&path).unwrap();
    let (first, rest) = text.split_once('\n').unwrap();
    assert_eq!(first, "lite-llm cluster CA 2");
    let old = format!("lite-llm cluster CA 1\nsecret {}\n{rest}", "0f".repeat(32));
    fs::write(&path, old).unwrap();
    fs::remove_file(state.join("join-secrets")).unwrap();
    let ca = ClusterCa::open(&state).unwrap();
    assert_eq!(ca.cluster(), cluster);
    ca.join_token(Role::Worker, "").unwrap();
    // Its token is named for what it is.
    let token = state.join("join-token");
    fs::write(&token, "lite-llm join token 1\ncluster x\n").unwrap();
    chmod(&token, 0o600);
    let error = JoinToken::read(&token).unwrap_err().to_string();
    assert!(error.contains("earlier release") && error.contains("worker.token"), "{error}");
}
