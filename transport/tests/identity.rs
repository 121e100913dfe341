//! Files of the authority and of tokens: private, stable, and clear about damage.

use std::fs;

use lite_llm_transport::{
    identity::{ClusterCa, Role},
    token::JoinToken,
};

#[test]
fn an_authority_is_made_once_and_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("deep/state");
    let made: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| ClusterCa::open_or_create(&state).unwrap().cluster()))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(made.iter().all(|cluster| *cluster == made[0]), "{made:?}");
    assert_eq!(ClusterCa::open_or_create(&state).unwrap().cluster(), made[0]);
    let files: Vec<_> = fs::read_dir(&state).unwrap().collect();
    assert_eq!(files.len(), 2, "staging files are left: {files:?}");
}

#[test]
fn a_token_reads_back_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    let ca = ClusterCa::ephemeral().unwrap();
    ca.join_token(Role::Worker, "old").unwrap().write(&path).unwrap();
    ca.join_token(Role::Worker, "127.0.0.1:7000").unwrap().write(&path).unwrap();
    let token = JoinToken::read(&path).unwrap();
    assert_eq!((token.cluster(), token.address()), (ca.cluster(), "127.0.0.1:7000"));
    let shown = format!("{token:?}");
    let text = fs::read_to_string(&path).unwrap();
    let secret = text.lines().find_map(|line| line.strip_prefix("secret ")).unwrap();
    assert!(!shown.contains(secret), "the secret is shown by Debug");
}

#[test]
fn every_cut_and_every_changed_byte_of_a_token_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    ClusterCa::ephemeral()
        .unwrap()
        .join_token(Role::Worker, "127.0.0.1:7000")
        .unwrap()
        .write(&path)
        .unwrap();
    let whole = fs::read(&path).unwrap();
    let check = |bytes: &[u8], what: String| {
        fs::write(&path, bytes).unwrap();
        let error = JoinToken::read(&path).expect_err(&what).to_string();
        assert!(error.contains("token") && error.contains("expected"), "{error}");
    };
    // The newline at the very end says nothing.
    for len in 0..whole.len() - 1 {
        check(&whole[..len], format!("cut at {len}"));
    }
    for at in 0..whole.len() - 1 {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        check(&damaged, format!("byte {at} changed"));
    }
    check(&vec![b'a'; 1 << 20], "long".to_owned());
    fs::remove_file(&path).unwrap();
    let error = JoinToken::read(&path).unwrap_err().to_string();
    assert!(error.contains("could not read the join token"), "{error}");
}

#[test]
fn a_damaged_authority_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    ClusterCa::open_or_create(folder.path()).unwrap();
    let path = folder.path().join("cluster-ca.pem");
    let whole = fs::read_to_string(&path).unwrap();
    let other = tempfile::tempdir().unwrap();
    ClusterCa::open_or_create(other.path()).unwrap();
    let others = fs::read_to_string(other.path().join("cluster-ca.pem")).unwrap();
    let key = |text: &str| text[text.find("-----BEGIN PRIVATE").unwrap()..].to_owned();
    for damaged in [
        String::new(),
        whole[..whole.len() / 2].to_owned(),
        whole.replace("CA 2", "CA 9"),
        whole.replace("CERTIFICATE", "CERTIFICAT"),
        whole.replace(&key(&whole), &key(&others)),
    ] {
        fs::write(&path, &damaged).unwrap();
        let error = ClusterCa::open_or_create(folder.path()).unwrap_err().to_string();
        assert!(error.contains("cluster-ca.pem") && error.contains("expected"), "{error}");
    }
}
