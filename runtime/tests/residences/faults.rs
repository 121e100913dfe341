//! What goes wrong with a disk cache: damage while it is stopped and while it runs, a disk that takes
//! nothing, folders that vanish, others that use them. Answers stay right; only their time changes.

use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use lite_llm_runtime::{
    expert::{ExpertKey, GatedMlp},
    residency::{Fetched, Urgency::Demand},
};

use super::model::{Client, Memory, Place, Source, folder, kept, model, over_memory, reader, wait};

/// All experts, one after the other, are right.
fn all_right(source: &Source) {
    let client = Client::new(1);
    for &key in &model().keys {
        client.fetch(&*source.fetcher, key, Demand);
        client.right(key);
    }
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    bytes[1000] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn truncate(path: &Path, bytes: u64) {
    File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

/// Experts of the model.
fn experts() -> u64 {
    model().keys.len() as u64 + 1
}

#[test]
fn what_was_kept_is_used_after_a_restart_and_what_was_damaged_meanwhile_is_not() {
    let [a, b, c, d, ..] = model().keys[..] else { panic!("there are that many") };
    let warm = Source::new(Place::Warm);
    let paths = [a, b, c, d].map(|key| warm.file(key).unwrap());
    let Source { fetcher, nvme, .. } = warm;
    drop(fetcher);
    flip(&paths[0]);
    truncate(&paths[1], 5000);
    fs::remove_file(&paths[2]).unwrap();
    // As a killed process leaves them.
    fs::write(paths[3].with_extension("part"), [1; 7000]).unwrap();
    let theirs = [nvme.path().join("notes.txt"), paths[3].with_file_name("notes.txt")];
    theirs.iter().for_each(|path| fs::write(path, "not ours").unwrap());
    let again = Source::reopened(nvme, experts());
    assert!(!paths[1].exists() && !paths[3].with_extension("part").exists(), "{paths:?}");
    let whole = model().keys.len() as u64 - 2;
    assert_eq!(again.fetcher.residences()[0].held, whole * model().slot);
    all_right(&again);
    let stats = again.fetcher.residences();
    assert_eq!((stats[0].damaged, stats[0].hits), (1, whole - 1), "{stats:?}");
    assert_eq!(*again.memory.reads.lock(), 3, "only those came from the store");
    wait(|| [a, b, c].iter().all(|&key| again.file(key).is_some()));
    assert!(theirs.iter().all(|path| path.exists()), "files that are not ours stay");
}

#[test]
fn what_is_damaged_while_it_runs_comes_from_below_into_the_same_slot_and_is_kept_again() {
    let [a, b, c, ..] = model().keys[..] else { panic!("there are that many") };
    let source = Source::new(Place::Warm);
    // Room for one slot: another one would be refused.
    let client = Client::new(1);
    for round in 1..4 {
        flip(&source.file(a).unwrap());
        truncate(&source.file(b).unwrap(), 100);
        fs::remove_file(source.file(c).unwrap()).unwrap();
        let reads = *source.memory.reads.lock();
        for key in [a, b, c] {
            client.fetch(&*source.fetcher, key, Demand);
            client.right(key);
            wait(|| {
                source
                    .file(key)
                    .is_some_and(|path| fs::metadata(path).unwrap().len() == model().bytes as u64)
            });
        }
        assert_eq!(*source.memory.reads.lock(), reads + 3);
        let stats = source.fetcher.residences();
        assert_eq!(stats[0].damaged, 3 * round, "{stats:?}");
        // The last one has its name; the writer is to have said so.
        wait(|| {
            client.fetch(&*source.fetcher, c, Demand);
            client.right(c);
            *source.memory.reads.lock() == reads + 3
        });
    }
}

#[test]
fn what_came_by_another_way_is_kept_too() {
    let [a, b, c, ..] = model().keys[..] else { panic!("there are that many") };
    let source = Source::new(Place::Empty);
    let client = Client::new(1);
    for key in [a, b] {
        let expert = expert(key);
        source.fetcher.keep(key, &expert);
        wait(|| source.file(key).is_some());
        // Once more: it is there.
        source.fetcher.keep(key, &expert);
    }
    let Source { fetcher, nvme, .. } = source;
    assert_eq!(fetcher.residences()[0].misses, 0, "nobody asked for it");
    drop(fetcher);
    let again = Source::reopened(nvme, experts());
    for key in [a, b, c] {
        client.fetch(&*again.fetcher, key, Demand);
        client.right(key);
    }
    let stats = again.fetcher.residences();
    assert_eq!((stats[0].hits, stats[0].misses, stats[0].damaged), (2, 1, 0), "{stats:?}");
    // A full disk makes room for it, or does not take it; it never holds more than it may.
    let half = Source::new(Place::Half);
    for &key in &model().keys {
        half.fetcher.keep(key, &expert(key));
        let stats = &half.fetcher.residences()[0];
        assert!(stats.held <= stats.budget.unwrap(), "{stats:?}");
    }
    wait(|| !kept(half.nvme.path()).is_empty());
    // Of no use where nothing is kept.
    let archive = Source::new(Place::Archive);
    archive.fetcher.keep(a, &expert(a));
    client.fetch(&*archive.fetcher, a, Demand);
    client.right(a);
}

fn expert(key: ExpertKey) -> GatedMlp {
    let (source, client) = (Source::new(Place::Archive), Client::new(1));
    client.fetch(&*source.fetcher, key, Demand);
    match client.answer() {
        (_, Fetched::Here(expert)) => expert,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_folder_that_vanishes_is_made_anew() {
    let source = Source::new(Place::Warm);
    fs::remove_dir_all(source.nvme.path()).unwrap();
    for round in 0..2 {
        all_right(&source);
        assert!(source.fetcher.residences()[0].damaged > 0, "round {round}");
    }
    wait(|| !kept(source.nvme.path()).is_empty());
}

#[test]
fn a_disk_without_room_costs_only_speed_and_is_tried_again() {
    let source = Source::new(Place::Empty);
    let folder = fs::read_dir(source.nvme.path()).unwrap().map(|entry| entry.unwrap().path());
    let folder = folder.into_iter().find(|path| path.is_dir()).unwrap();
    // Writing there says that there is no room.
    for &ExpertKey { layer, tier, group, expert } in &model().keys {
        let name = format!("{layer}-{tier}-{group}-{expert}.part");
        symlink("/dev/full", folder.join(name)).unwrap();
    }
    let client = Client::new(1);
    for &key in &model().keys {
        let failures = source.fetcher.residences()[0].failures;
        client.fetch(&*source.fetcher, key, Demand);
        client.right(key);
        if failures < 3 {
            wait(|| source.fetcher.residences()[0].failures > failures);
        }
    }
    let stats = source.fetcher.residences();
    let tries = stats[0].failures;
    assert!((3..model().keys.len() as u64 / 2).contains(&tries), "{stats:?}");
    assert_eq!(stats[0].hits, 0, "{stats:?}");
    // What is being written counts until it has failed.
    wait(|| source.fetcher.residences()[0].held == 0);
    // There is room again.
    for entry in fs::read_dir(&folder).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    wait(|| {
        all_right(&source);
        source.fetcher.residences()[0].hits > 0
    });
}

#[test]
fn a_folder_that_cannot_be_written_to_is_read() {
    let Source { fetcher, nvme, .. } = Source::new(Place::Warm);
    drop(fetcher);
    let inner = fs::read_dir(nvme.path()).unwrap().map(|entry| entry.unwrap().path());
    let inner = inner.into_iter().find(|path| path.is_dir()).unwrap();
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    mode(&inner, 0o555).unwrap();
    if File::create(inner.join("x")).is_ok() {
        eprintln!("skipped: this user may write to everything");
        return;
    }
    // Less than there is: what is too much cannot be deleted, and nothing is written beside it.
    let source = Source::reopened(nvme, 4);
    all_right(&source);
    let stats = source.fetcher.residences();
    assert!(stats[0].hits >= 4, "{stats:?}");
    mode(&inner, 0o755).unwrap();
}

#[test]
fn a_folder_belongs_to_one_process_at_a_time() {
    let source = Source::new(Place::Empty);
    let open = || over_memory(&Memory::new(), &reader(true), source.nvme.path(), experts());
    let error = open().expect_err("it is in use").to_string();
    let path = source.nvme.path().display().to_string();
    assert!(error.contains(&path) && error.contains("another process"), "{error}");
    all_right(&source);
    let Source { fetcher, nvme, .. } = source;
    drop(fetcher);
    // At once: nothing of the first goes on.
    drop(Source::reopened(nvme, experts()));
    // A path that is no folder is said, too.
    let dir = folder();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = over_memory(&Memory::new(), &reader(true), &file, 4).unwrap_err().to_string();
    assert!(error.contains(&file.display().to_string()), "{error}");
}

#[test]
fn what_another_takes_the_place_of_lets_go_of_the_folder_and_goes_on_without() {
    let old = Source::new(Place::Empty);
    let (first, rest) = model().keys.split_at(2);
    old.fill(first);
    old.fetcher.retire();
    // At once, while the old one lives and is asked.
    let new = over_memory(&Memory::new(), &reader(true), old.nvme.path(), experts()).unwrap();
    assert_eq!(
        new.residences()[0].held,
        first.len() as u64 * model().slot,
        "it finds what was kept"
    );
    all_right(&old);
    assert!(rest.iter().all(|&key| old.file(key).is_none()), "the old one writes nothing any more");
    let client = Client::new(1);
    for &key in first {
        client.fetch(&*new, key, Demand);
        client.right(key);
    }
    assert_eq!(new.residences()[0].hits, first.len() as u64, "nor has it deleted anything");
}

#[test]
fn less_room_than_before_is_kept_to_at_once_and_other_models_make_room() {
    let Source { fetcher, nvme, .. } = Source::new(Place::Warm);
    drop(fetcher);
    let other = nvme.path().join("experts-0123456789abcdef");
    fs::create_dir(&other).unwrap();
    for expert in 0..10 {
        fs::write(other.join(format!("0-0-0-{expert}")), vec![1; 5000]).unwrap();
    }
    let bytes =
        |nvme: &Path| -> u64 { kept(nvme).iter().map(|(_, len)| len.next_multiple_of(4096)).sum() };
    let budget = 12 * model().slot;
    let source = Source::reopened(nvme, 12);
    assert!(bytes(source.nvme.path()) <= budget);
    let held = source.fetcher.residences()[0].held;
    assert_eq!(held, budget, "ours go first");
    assert_eq!(fs::read_dir(&other).unwrap().count(), 0);
    let Source { fetcher, nvme, .. } = source;
    drop(fetcher);
    // With room for all, others' files stay until ours need it.
    fs::create_dir_all(&other).unwrap();
    for expert in 0..10 {
        fs::write(other.join(format!("0-0-0-{expert}")), vec![1; 5000]).unwrap();
    }
    let source = Source::reopened(nvme, 18);
    let budget = 18 * model().slot;
    assert_eq!(fs::read_dir(&other).unwrap().count(), 10, "they have room");
    let client = Client::new(1);
    for &key in model().keys.iter().chain(&model().keys) {
        client.fetch(&*source.fetcher, key, Demand);
        client.right(key);
        assert!(bytes(source.nvme.path()) <= budget);
    }
    wait(|| fs::read_dir(&other).unwrap().count() < 10);
    wait(|| source.fetcher.residences()[0].held == budget);
    assert!(bytes(source.nvme.path()) <= budget);
}
