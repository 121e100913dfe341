//! One fetcher and one peer that does not do what it should.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use lite_llm_actors::{
    lane::LaneInbox,
    links::Links,
    peers::{Epoch, FAILED_PAUSES, PeerFetcher, PeerOptions},
    placement::Placement,
};
use lite_llm_kernels::slots::SlotPool;
use lite_llm_runtime::{
    blocks::{BlockOptions, BlockReader},
    checkpoint::Checkpoint,
    expert::{ExpertKey, GatedMlp},
    residency::{FetchOptions, Fetched, Fetcher, NvmeFolder, Urgency, fetcher_for},
};
use lite_llm_tests::reference;
use lite_llm_transport::{
    connection::StreamKind,
    endpoint::{Endpoint, Options},
    frame::{FrameReceiver, FrameSender},
    identity::{ClusterCa, Role},
    messages::{
        NodeAddress, OutgoingWeights, PlacementRule, WEIGHTS_CHUNK_BYTES, WeightsReply,
        WeightsRequest,
    },
    pool::BufferPool,
};

use crate::{bytes_of, cluster::far, hello, large, loopback, peers, soon};

/// What a peer does with a request.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ways {
    Honest,
    NotHere,
    Busy,
    /// One bit is another.
    Damaged,
    /// Says that it has other bytes than there are.
    Long(u64),
    /// Sends more than it has said.
    More,
    /// Sends a part, and then says that it has let it go.
    LetsGo,
    Silent,
    /// Is honest a few times, and then silent.
    Tires,
    /// Begins and stops.
    Stops,
    /// Hangs up.
    Leaves,
}

/// Answers of who tires.
const ANSWERED_BEFORE_TIRED: usize = 3;

async fn play(
    way: Ways,
    checkpoint: &Checkpoint,
    sender: &mut FrameSender,
    receiver: &mut FrameReceiver,
) -> Option<()> {
    let request = receiver.recv_message::<WeightsRequest>().await.ok()??;
    assert_eq!(request.checkpoint, checkpoint.id());
    let WeightsRequest { layer, tier, group, expert, .. } = request;
    let key = ExpertKey { layer, tier, group, expert };
    let mut bytes = bytes_of(&checkpoint.expert(key).unwrap());
    let here = |bytes: u64| WeightsReply::Here { bytes };
    let head = match way {
        Ways::NotHere => WeightsReply::NotHere,
        Ways::Busy => WeightsReply::Busy,
        Ways::Long(bytes) => here(bytes),
        Ways::Silent => {
            std::future::pending::<()>().await;
            return Some(());
        }
        Ways::Leaves => return None,
        _ => here(bytes.len() as u64),
    };
    sender.send_message(&head).await.ok()?;
    match way {
        Ways::Damaged => *bytes.last_mut()? ^= 1,
        Ways::More => bytes.push(0),
        Ways::LetsGo | Ways::Stops => bytes.truncate(100),
        Ways::Honest => {}
        _ => return Some(()),
    }
    for part in bytes.chunks(WEIGHTS_CHUNK_BYTES) {
        let mut out = OutgoingWeights::new(part.len(), &BufferPool::default()).unwrap();
        out.bytes_mut().copy_from_slice(part);
        sender.send(out.finish()).await.ok()?;
    }
    match way {
        Ways::LetsGo => sender.send_message(&WeightsReply::NotHere).await.ok(),
        Ways::Stops => {
            std::future::pending::<()>().await;
            Some(())
        }
        _ => Some(()),
    }
}

/// A peer, and how often it was asked.
fn peer(ca: &ClusterCa, way: Ways, checkpoint: Arc<Checkpoint>) -> (Endpoint, Arc<AtomicUsize>) {
    let identity = ca.identity(Role::Worker, "w2").unwrap();
    let endpoint = Endpoint::bind(loopback(), &identity, Options::new(hello())).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let (accepting, counts) = (endpoint.clone(), asked.clone());
    tokio::spawn(async move {
        while let Some(connection) = accepting.accept().await {
            while let Some(stream) = connection.accept_stream().await {
                assert_eq!(stream.kind, StreamKind::Weights);
                let (checkpoint, counts) = (checkpoint.clone(), counts.clone());
                let connection = connection.clone();
                tokio::spawn(async move {
                    let (mut sender, mut receiver) = stream.into_frames();
                    let way = || match way {
                        Ways::Tires if counts.load(Relaxed) < ANSWERED_BEFORE_TIRED => Ways::Honest,
                        Ways::Tires => Ways::Silent,
                        way => way,
                    };
                    while play(way(), &checkpoint, &mut sender, &mut receiver).await.is_some() {
                        counts.fetch_add(1, Relaxed);
                    }
                    if way() == Ways::Leaves {
                        counts.fetch_add(1, Relaxed);
                        connection.close("I leave");
                    }
                });
            }
        }
    });
    (endpoint, asked)
}

/// A fetcher whose one peer has everything, as it says.
fn fetcher(ca: &ClusterCa, checkpoint: &Arc<Checkpoint>, peer: &Endpoint) -> PeerFetcher {
    fetcher_over(ca, checkpoint, peer, None)
}

/// The same above a disk cache.
fn fetcher_over(
    ca: &ClusterCa,
    checkpoint: &Arc<Checkpoint>,
    peer: &Endpoint,
    nvme: Option<NvmeFolder>,
) -> PeerFetcher {
    let identity = ca.identity(Role::Worker, "w1").unwrap();
    let endpoint = Endpoint::bind(loopback(), &identity, Options::new(hello())).unwrap();
    let reader = BlockReader::new(BlockOptions::default()).unwrap();
    let ways = FetchOptions { reader, nvme, threads: 1, requests: 1 };
    let next = fetcher_for(checkpoint, ways).unwrap();
    let links = Links::new(endpoint, LaneInbox::default());
    let fetcher = PeerFetcher::new(PeerOptions { checkpoint: checkpoint.clone(), next, links });
    let rule =
        PlacementRule { tier: 0, first_group: 0, end_group: 1, copies: 2, holders: vec![0, 1] };
    let placement = Placement::new(checkpoint.config(), vec![rule]).unwrap();
    let at = |name: &str, address: String| NodeAddress { name: name.into(), address };
    let address = peer.local_addr().unwrap().to_string();
    let nodes = vec![at("w1", "127.0.0.1:1".into()), at("w2", address)];
    fetcher.arrange(vec![Epoch { placement: Arc::new(placement), nodes, me: 0, any: false }]);
    fetcher
}

async fn fetch(
    fetcher: &PeerFetcher,
    key: ExpertKey,
    pool: &Arc<SlotPool>,
    bytes: u64,
) -> GatedMlp {
    let (done, fetched) = tokio::sync::oneshot::channel();
    let slot = pool.take(bytes as usize).unwrap();
    let done = Box::new(move |fetched| drop(done.send(fetched)));
    fetcher.fetch(key, slot, Urgency::Demand, done);
    match soon("a fetch", fetched).await.unwrap() {
        Fetched::Here(expert) => expert,
        other => panic!("{key}: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_peer_answers_the_bytes_are_right_and_come_in_time() {
    let (_folder, checkpoint, _) = reference("olmoe");
    let keys: Vec<ExpertKey> = checkpoint.config().expert_keys().collect();
    let bytes = checkpoint.tier_expert_bytes()[0];
    let ca = ClusterCa::ephemeral().unwrap();
    let all = [
        Ways::Honest,
        Ways::NotHere,
        Ways::Busy,
        Ways::Damaged,
        Ways::Long(bytes - 1),
        Ways::Long(bytes + 1),
        Ways::Long(0),
        Ways::Long(u64::MAX),
        Ways::More,
        Ways::LetsGo,
        Ways::Silent,
        Ways::Stops,
        Ways::Leaves,
    ];
    for way in all {
        let (peer_endpoint, asked) = peer(&ca, way, checkpoint.clone());
        let fetcher = fetcher(&ca, &checkpoint, &peer_endpoint);
        // Room for one: whatever fails on the way, the slot is used again.
        let pool = SlotPool::new(bytes.next_multiple_of(4096));
        let begun = Instant::now();
        for &key in &keys[..6] {
            let expert = fetch(&fetcher, key, &pool, bytes).await;
            assert!(bytes_of(&expert) == bytes_of(&checkpoint.expert(key).unwrap()), "{way:?}");
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(10), "{way:?}: {took:?}");
        let seen = peers(&fetcher.residences());
        println!("{way:?}: {took:?}, asked {asked:?}, {seen:?}");
        let lies = matches!(way, Ways::Damaged | Ways::Long(_) | Ways::More);
        let lost = matches!(way, Ways::Silent | Ways::Stops | Ways::Leaves);
        assert_eq!(seen.hits > 0, way == Ways::Honest, "{way:?}: {seen:?}");
        assert_eq!(seen.bytes_read, seen.hits * bytes);
        assert_eq!((seen.damaged, seen.failures), (lies.into(), lost.into()), "{way:?}: {seen:?}");
        if lies || lost {
            assert!(asked.load(Relaxed) <= 1, "{way:?}: it is not asked again so soon");
        }
        drop(fetcher);
        peer_endpoint.close("the test is over").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_of_several_parts_are_right_whatever_comes_of_the_parts() {
    let (_folder, checkpoint) = large();
    let keys: Vec<ExpertKey> = checkpoint.config().expert_keys().collect();
    let bytes = checkpoint.tier_expert_bytes()[0];
    assert!(bytes > 2 * WEIGHTS_CHUNK_BYTES as u64, "{bytes}");
    let ca = ClusterCa::ephemeral().unwrap();
    for way in [Ways::Honest, Ways::Damaged, Ways::More, Ways::LetsGo, Ways::Leaves] {
        let (peer_endpoint, _) = peer(&ca, way, checkpoint.clone());
        let fetcher = fetcher(&ca, &checkpoint, &peer_endpoint);
        let pool = SlotPool::new(bytes.next_multiple_of(4096));
        for &key in &keys[..4] {
            let expert = fetch(&fetcher, key, &pool, bytes).await;
            assert!(bytes_of(&expert) == bytes_of(&checkpoint.expert(key).unwrap()), "{way:?}");
        }
        let seen = peers(&fetcher.residences());
        assert_eq!(seen.hits > 0, way == Ways::Honest, "{way:?}: {seen:?}");
        drop(fetcher);
        peer_endpoint.close("the test is over").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_peer_brought_is_on_the_disk_afterwards() {
    let (folder, checkpoint, _) = reference("olmoe");
    let keys: Vec<ExpertKey> = checkpoint.config().expert_keys().collect();
    let bytes = checkpoint.tier_expert_bytes()[0];
    let ca = ClusterCa::ephemeral().unwrap();
    let (peer_endpoint, _) = peer(&ca, Ways::Honest, checkpoint.clone());
    let disk = NvmeFolder { folder: folder.path().join("disk"), budget: 1 << 30 };
    let fetcher = fetcher_over(&ca, &checkpoint, &peer_endpoint, Some(disk.clone()));
    let pool = SlotPool::new(bytes.next_multiple_of(4096));
    let of_disk = |fetcher: &PeerFetcher| {
        fetcher.residences().into_iter().find(|it| it.name.starts_with("nvme ")).unwrap()
    };
    let mut brought = Vec::new();
    for &key in &keys {
        let before = peers(&fetcher.residences()).hits;
        fetch(&fetcher, key, &pool, bytes).await;
        if peers(&fetcher.residences()).hits > before {
            brought.push(key);
        }
    }
    assert!(!brought.is_empty());
    // It ends when all is written; whoever reads it next verifies it.
    drop(fetcher);
    peer_endpoint.close("the test is over").await;
    let fetcher = fetcher_over(&ca, &checkpoint, &peer_endpoint, Some(disk));
    let kept = of_disk(&fetcher).held / bytes.next_multiple_of(4096);
    for &key in &brought {
        let expert = fetch(&fetcher, key, &pool, bytes).await;
        assert!(bytes_of(&expert) == bytes_of(&checkpoint.expert(key).unwrap()));
    }
    let seen = of_disk(&fetcher);
    // A disk that is behind may leave some out.
    assert!(kept as usize * 2 >= keys.len(), "{kept} of {}", keys.len());
    assert!(seen.hits as usize * 2 >= brought.len() && seen.damaged == 0, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_hangs_is_asked_less_and_less_often() {
    let (folder, checkpoint, _) = reference("olmoe");
    let key = checkpoint.config().expert_keys().next().unwrap();
    let bytes = checkpoint.tier_expert_bytes()[0];
    let ca = ClusterCa::ephemeral().unwrap();
    let (peer_endpoint, asked) = peer(&ca, Ways::Tires, checkpoint.clone());
    // The other way is so slow that the peer is asked whenever it may be.
    let (far, pause) = far(folder.path());
    let fetcher = fetcher(&ca, &far, &peer_endpoint);
    pause.store(100, Relaxed);
    let pool = SlotPool::new(bytes.next_multiple_of(4096));
    let failures = || peers(&fetcher.residences()).failures as usize;
    let deadline = Instant::now() + Duration::from_secs(60);
    while failures() == 0 {
        assert!(Instant::now() < deadline, "it is not asked: {asked:?}");
        fetch(&fetcher, key, &pool, bytes).await;
    }
    assert_eq!(asked.load(Relaxed), ANSWERED_BEFORE_TIRED);
    let (begun, mut told) = (Instant::now(), vec![Duration::ZERO]);
    while begun.elapsed() < Duration::from_secs(14) {
        fetch(&fetcher, key, &pool, bytes).await;
        if failures() > told.len() {
            told.push(begun.elapsed());
        }
    }
    // Each failure takes a second: after a pause of 5 s once more, and not again before 10 have passed.
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[1] >= FAILED_PAUSES.0, "{told:?}");
    drop(fetcher);
    peer_endpoint.close("the test is over").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_gone_is_given_up_in_time() {
    let (_folder, checkpoint, _) = reference("olmoe");
    let keys: Vec<ExpertKey> = checkpoint.config().expert_keys().collect();
    let bytes = checkpoint.tier_expert_bytes()[0];
    let ca = ClusterCa::ephemeral().unwrap();
    let (peer_endpoint, _) = peer(&ca, Ways::Honest, checkpoint.clone());
    let fetcher = fetcher(&ca, &checkpoint, &peer_endpoint);
    peer_endpoint.close("gone").await;
    drop(peer_endpoint);
    let pool = SlotPool::new(bytes.next_multiple_of(4096));
    let begun = Instant::now();
    for &key in &keys[..6] {
        fetch(&fetcher, key, &pool, bytes).await;
    }
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(peers(&fetcher.residences()).failures, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_promoted_cancelled_and_ended_with_the_fetcher() {
    let (_folder, checkpoint, _) = reference("olmoe");
    let keys: Vec<ExpertKey> = checkpoint.config().expert_keys().collect();
    let bytes = checkpoint.tier_expert_bytes()[0];
    let ca = ClusterCa::ephemeral().unwrap();
    for way in [Ways::Honest, Ways::Silent] {
        let (peer_endpoint, _) = peer(&ca, way, checkpoint.clone());
        let fetcher = fetcher(&ca, &checkpoint, &peer_endpoint);
        let pool = SlotPool::new(1 << 30);
        let (done, mut ended) = tokio::sync::mpsc::unbounded_channel();
        for (i, &key) in keys.iter().enumerate() {
            let slot = pool.take(bytes as usize).unwrap();
            let done = done.clone();
            let urgency = [Urgency::Demand, Urgency::Prefetch][i % 2];
            fetcher.fetch(key, slot, urgency, Box::new(move |f| drop(done.send((key, f)))));
            match i % 3 {
                0 => fetcher.cancel(key),
                1 => fetcher.promote(key),
                _ => {}
            }
        }
        drop((fetcher, done));
        // Each is told once, and every slot comes back.
        let mut told = Vec::new();
        while let Some((key, fetched)) = soon("an answer", ended.recv()).await {
            assert!(!matches!(fetched, Fetched::Failed(_)), "{key}: {fetched:?}");
            told.push(key);
        }
        told.sort_unstable();
        assert_eq!(told, keys);
        assert_eq!(pool.used(), 0);
        peer_endpoint.close("the test is over").await;
    }
}
