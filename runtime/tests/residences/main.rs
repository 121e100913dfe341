//! One suite for every way that experts come into memory, then what only some of them promise.

mod faults;
mod model;

use std::{
    collections::BTreeMap,
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use lite_llm_kernels::slots::SlotPool;
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    expert::ExpertKey,
    import::{
        ImportOptions, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
    residency::{
        Fetched, Fetcher, LocalFetcher,
        Urgency::{Demand, Prefetch},
    },
};

use self::model::{
    Client, Fault, PATIENCE, PLACES, Place, Random, Source, check, folder, kept, model, reader,
    wait,
};

/// Every source, with its place in what fails.
fn sources() -> impl Iterator<Item = (Place, Source)> {
    PLACES.into_iter().map(|place| {
        eprintln!("{place:?}");
        (place, Source::new(place))
    })
}

#[test]
fn experts_are_what_the_checkpoint_has() {
    for (_, source) in sources() {
        let client = Client::new(2 * model().keys.len());
        for round in 0..3 {
            for &key in &model().keys {
                let urgency = [Demand, Prefetch][round % 2];
                client.fetch(&*source.fetcher, key, urgency);
            }
            let mut keys = model().keys.clone();
            for _ in &model().keys {
                let (key, fetched) = client.answer();
                check(key, &fetched);
                keys.retain(|other| *other != key);
            }
            assert_eq!(keys, [], "each is answered once");
        }
        assert_eq!(client.pool.used(), 0);
        let all = source.fetcher.residences();
        let brought: u64 = all.iter().map(|stats| stats.hits).sum();
        assert!(brought >= 3 * model().keys.len() as u64, "{all:?}");
    }
}

#[test]
fn what_is_demanded_goes_before_what_may_be_wanted() {
    let [_, a, b, c, d, ..] = model().keys[..] else { panic!("there are that many") };
    for (_, source) in sources() {
        let (client, held) = (Client::new(4), source.hold());
        client.fetch(&*source.fetcher, a, Prefetch);
        client.fetch(&*source.fetcher, b, Prefetch);
        client.fetch(&*source.fetcher, c, Demand);
        client.fetch(&*source.fetcher, d, Demand);
        held.release();
        [c, d, a, b].into_iter().for_each(|key| client.right(key));
    }
}

#[test]
fn what_is_wanted_after_all_goes_before_the_rest() {
    let [_, a, b, c, ..] = model().keys[..] else { panic!("there are that many") };
    for (_, source) in sources() {
        let (client, held) = (Client::new(3), source.hold());
        [a, b, c].into_iter().for_each(|key| client.fetch(&*source.fetcher, key, Prefetch));
        source.fetcher.promote(c);
        // Unknown ones do no harm.
        source.fetcher.promote(model().broken);
        source.fetcher.cancel(model().broken);
        held.release();
        [c, a, b].into_iter().for_each(|key| client.right(key));
    }
}

#[test]
fn what_was_cancelled_before_it_began_gives_its_slot_back() {
    let [_, a, b, c, ..] = model().keys[..] else { panic!("there are that many") };
    for (_, source) in sources() {
        let (client, held) = (Client::new(3), source.hold());
        client.fetch(&*source.fetcher, a, Demand);
        client.fetch(&*source.fetcher, b, Prefetch);
        client.fetch(&*source.fetcher, c, Prefetch);
        source.fetcher.cancel(a);
        source.fetcher.cancel(b);
        held.release();
        client.cancelled(&[a, b]);
        client.cancelled(&[a, b]);
        client.right(c);
        assert_eq!(client.pool.used(), 0);
        // It can be fetched again.
        client.fetch(&*source.fetcher, a, Demand);
        client.right(a);
    }
}

#[test]
fn what_cannot_be_had_is_an_error_that_names_it_and_gives_its_slot_back() {
    let broken = model().broken;
    for (_, source) in sources() {
        // Room for one: whoever fails gives it back, or the next has none.
        let client = Client::new(1);
        for _ in 0..2 {
            client.fetch(&*source.fetcher, broken, Demand);
            let (_, Fetched::Failed(error)) = client.answer() else { panic!("it is damaged") };
            let error = error.to_string();
            assert!(error.contains(&broken.to_string()), "{error}");
            assert!(error.contains("blake3") && error.contains("safetensors"), "{error}");
            client.fetch(&*source.fetcher, model().keys[0], Demand);
            client.right(model().keys[0]);
        }
        let unknown = ExpertKey { expert: 1000, ..broken };
        client.fetch(&*source.fetcher, unknown, Prefetch);
        let (_, Fetched::Failed(error)) = client.answer() else { panic!("there is none") };
        assert!(error.to_string().contains(&unknown.to_string()), "{error}");
        let stats = source.fetcher.residences();
        let last = stats.last().unwrap();
        assert!(last.failures + last.damaged >= 3, "{stats:?}");
        assert!(kept(source.nvme.path()).iter().all(|(path, _)| !path.ends_with("2-0-0-7")));
    }
}

#[test]
fn any_interleaving_ends_with_every_fetch_answered_once_and_right() {
    for (place, source) in sources() {
        let budget = source.fetcher.residences()[0].budget;
        for seed in 0..200 {
            interleave(&source, seed, budget);
        }
        if matches!(place, Place::Half) {
            let stats = source.fetcher.residences();
            assert!(stats[0].hits > 200 && stats[0].misses > 200, "{stats:?}");
        }
    }
}

fn interleave(source: &Source, seed: u64, budget: Option<u64>) {
    let (mut random, client) = (Random(seed), Client::new(8));
    // Whether they were cancelled.
    let mut under_way: BTreeMap<ExpertKey, bool> = BTreeMap::new();
    let experts = model().keys.len() + 1;
    let answer = |under_way: &mut BTreeMap<ExpertKey, bool>, (key, fetched): (_, Fetched)| {
        let cancelled = under_way.remove(&key).expect("it is answered once");
        match &fetched {
            Fetched::Cancelled => assert!(cancelled, "seed {seed}: nobody cancelled {key}"),
            Fetched::Failed(error) => assert_eq!(key, model().broken, "seed {seed}: {error}"),
            Fetched::Here(_) => check(key, &fetched),
        }
    };
    for _ in 0..30 {
        let at = random.below(experts);
        let key = model().keys.get(at).copied().unwrap_or(model().broken);
        let urgency = [Demand, Prefetch][random.below(2)];
        match random.below(5) {
            0..3 if !under_way.contains_key(&key) && under_way.len() < 8 => {
                client.fetch(&*source.fetcher, key, urgency);
                under_way.insert(key, false);
            }
            3 if random.below(2) == 0 => source.fetcher.promote(key),
            _ => {
                if let Some(cancelled) = under_way.get_mut(&key) {
                    *cancelled = true;
                    source.fetcher.cancel(key);
                }
            }
        }
        while let Ok(fetched) = client.answers.try_recv() {
            answer(&mut under_way, fetched);
        }
        if let Some(budget) = budget {
            let bytes: u64 =
                kept(source.nvme.path()).iter().map(|(_, len)| len.next_multiple_of(4096)).sum();
            assert!(bytes <= budget, "seed {seed}: {bytes} of {budget} on the disk");
        }
    }
    while !under_way.is_empty() {
        answer(&mut under_way, client.answer());
    }
    assert_eq!(client.pool.used(), 0, "seed {seed}");
    assert!(client.answers.try_recv().is_err(), "seed {seed}: answered twice");
}

#[test]
fn dropping_it_answers_what_is_under_way() {
    for (_, source) in sources() {
        let client = Client::new(8);
        for (at, &key) in model().keys[..8].iter().enumerate() {
            client.fetch(&*source.fetcher, key, [Demand, Prefetch][at % 2]);
        }
        let Source { fetcher, reader, .. } = source;
        drop(fetcher);
        for _ in 0..8 {
            let (key, fetched) = client.answer();
            match &fetched {
                Fetched::Cancelled => {}
                _ => check(key, &fetched),
            }
        }
        wait(|| client.pool.used() == 0);
        drop(reader);
    }
}

#[test]
fn an_answer_may_drop_it_or_panic() {
    let [a, b, ..] = model().keys[..] else { panic!("there are that many") };
    for (_, source) in sources() {
        let client = Client::new(2);
        let slot = client.pool.take(model().bytes).unwrap();
        source.fetcher.fetch(a, slot, Demand, Box::new(|_| panic!("on purpose")));
        client.fetch(&*source.fetcher, b, Demand);
        client.right(b);
        let (slot, (tell, told)) = (client.pool.take(model().bytes).unwrap(), mpsc::channel());
        let (go_on, gone_on) = mpsc::channel::<()>();
        let last = source.fetcher.clone();
        let done = Box::new(move |fetched| {
            let _ = gone_on.recv_timeout(PATIENCE);
            drop(last);
            tell.send(matches!(fetched, Fetched::Here(_))).unwrap();
        });
        source.fetcher.fetch(a, slot, Demand, done);
        drop(source);
        drop(go_on);
        assert!(told.recv_timeout(PATIENCE).unwrap());
    }
}

#[test]
fn nobody_waits_for_a_store_that_does_not_answer_but_who_needs_it() {
    for place in [Place::Archive, Place::Empty] {
        let source = Source::new(place);
        source.memory.asked_by.lock().clear();
        source.memory.shut(true);
        let (client, begun) = (Client::new(3), Instant::now());
        for &key in &model().keys[..3] {
            client.fetch(&*source.fetcher, key, Prefetch);
        }
        wait(|| !source.memory.asked_by.lock().is_empty());
        // One has begun. The others have not, and need not.
        let [a, b, c, ..] = model().keys[..] else { panic!("there are that many") };
        source.fetcher.cancel(a);
        source.fetcher.cancel(b);
        source.fetcher.promote(c);
        let Source { fetcher, memory, .. } = source;
        drop(fetcher);
        assert!(begun.elapsed() < PATIENCE);
        memory.shut(false);
        let answers = [client.answer(), client.answer(), client.answer()];
        let of = |key| &answers.iter().find(|(of, _)| *of == key).unwrap().1;
        assert!(matches!(of(a), Fetched::Here(_)) && matches!(of(b), Fetched::Cancelled));
        // The last may begin before a thread that ends lets the archive go.
        assert!(!matches!(of(c), Fetched::Failed(_)), "{answers:?}");
        assert!(!memory.asked_by.lock().contains(&thread::current().id()));
    }
}

#[test]
fn what_a_store_does_wrong_is_told_or_read_again() {
    let [a, b, c, ..] = model().keys[..] else { panic!("there are that many") };
    for place in [Place::Archive, Place::Empty] {
        let (source, client) = (Source::new(place), Client::new(1));
        let fail = |fault| *source.memory.fault.lock() = fault;
        fail(Some(Fault::CorruptsOnce));
        client.fetch(&*source.fetcher, a, Demand);
        client.right(a);
        assert_eq!(source.fetcher.residences().last().unwrap().damaged, 1);
        fail(Some(Fault::Refuses));
        client.fetch(&*source.fetcher, b, Demand);
        let (_, Fetched::Failed(error)) = client.answer() else { panic!("it refuses") };
        let error = error.to_string();
        assert!(error.contains(&b.to_string()) && error.contains("memory://"), "{error}");
        fail(Some(Fault::Panics));
        client.fetch(&*source.fetcher, b, Demand);
        let (_, Fetched::Failed(error)) = client.answer() else { panic!("it panics") };
        assert!(error.to_string().contains("not foreseen"), "{error}");
        fail(None);
        for key in [b, c] {
            client.fetch(&*source.fetcher, key, Demand);
            client.right(key);
        }
    }
}

#[test]
fn a_folder_of_many_files_keeps_few_of_them_open() {
    let dir = folder();
    let (source, out) = (dir.path().join("hf"), dir.path().join("many"));
    let shape = RandomShape { layers: 20, ..RandomShape::tiny(RandomClass::Olmoe) };
    write_random_hf(&source, &shape, &mut |_, _| {}).unwrap();
    let options = ImportOptions {
        tiers: Some("tier_1b:8x1".parse().unwrap()),
        routes: Some("1x2x1".parse().unwrap()),
        ..ImportOptions::new(&*source, &*out)
    };
    import(&options, &mut |_, _, _| {}).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&out).unwrap());
    let fetcher = LocalFetcher::new(checkpoint.clone(), reader(true), 1).unwrap();
    let bytes = checkpoint.tier_expert_bytes()[0] as usize;
    let (pool, (tell, told)) = (SlotPool::new(1 << 20), mpsc::channel());
    let keys: Vec<ExpertKey> = checkpoint.config().expert_keys().collect();
    assert_eq!(keys.len(), 160, "each in a file of its own");
    for key in keys.iter().chain(keys.iter().rev()) {
        let (slot, tell) = (pool.take(bytes).unwrap(), tell.clone());
        fetcher.fetch(*key, slot, Demand, Box::new(move |fetched| tell.send(fetched).unwrap()));
        let fetched = told.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(fetched, Fetched::Here(_)), "{fetched:?}");
    }
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let open = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let open = open.filter(|path| path.starts_with(out.canonicalize().unwrap())).count();
    assert!((100..=129).contains(&open), "{open} files are open");
}

#[test]
fn it_says_how_it_reads() {
    let said = |place| Source::new(place).fetcher.describe();
    assert!(said(Place::Folder).contains("plain by "), "{}", said(Place::Folder));
    assert_eq!(said(Place::Archive), "memory://model");
    assert_eq!(said(Place::Embedded), "the embedded checkpoint");
    // Embedded experts are read by no block reader, whoever fetches them.
    let files: &[(&str, &[u8])] = model().embedded();
    let embedded = Arc::new(Checkpoint::embedded(files).unwrap());
    let local = LocalFetcher::new(embedded, reader(true), 1).unwrap();
    assert_eq!(local.describe(), "the embedded checkpoint");
    let over = said(Place::Half);
    assert!(over.contains("GiB of ") && over.ends_with(", then memory://model"), "{over}");
    let names: Vec<String> = Source::new(Place::Half)
        .fetcher
        .residences()
        .into_iter()
        .map(|stats| stats.name.split(' ').next().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(names, ["nvme", "archive"]);
}
