//! What policies keep, let go and learn.

use super::*;

const SHAPE: Shape = Shape { layers: 2, experts: 20, active: 2 };

/// Two sequences; expert 3 is used by every token, one of 4 to 19 in turns beside it.
fn teach(policy: &mut dyn Policy, tokens: u32) {
    for t in 0..tokens {
        for (stream, layer) in [(7, 0), (9, 0), (7, 1), (9, 1)] {
            let experts = [3, t * 7 % 16 + 4];
            let last = [t % 5, (t + 4) % 5, (t + 3) % 5];
            policy.used(layer, &Row { stream, last, experts: &experts, near: &[] });
            if stream == 9 {
                policy.passed(layer);
            }
        }
    }
}

fn all() -> Vec<Box<dyn Policy>> {
    vec![
        Box::new(Lru::new(SHAPE)),
        Box::new(Segmented::new(SHAPE, 5)),
        Box::new(Ageing::new(SHAPE)),
        Box::new(Foresight::within(SHAPE, 200 << 10).unwrap()),
    ]
}

#[test]
fn equal_calls_give_equal_bits_and_what_is_always_used_is_worth_most() {
    for (mut a, mut b) in all().into_iter().zip(all()) {
        teach(&mut *a, 400);
        teach(&mut *b, 400);
        a.ended(7);
        b.ended(7);
        for layer in 0..2 {
            let values = |p: &dyn Policy| (0..20).map(|e| p.value(layer, e)).collect::<Vec<_>>();
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            let values = [values(&*a), values(&*b)];
            assert_eq!(bits(&values[0]), bits(&values[1]), "{a:?}");
            assert!(values[0].iter().all(|v| (0.0..=1.0).contains(v)), "{values:?}");
            let others = (0..20).filter(|&e| e != 3).map(|e| values[0][e]);
            assert!(others.fold(0.0, f32::max) < values[0][3], "{values:?}");
            assert!((0..3).all(|e| values[0][e] <= values[0][4]), "{values:?}");
        }
    }
}

#[test]
fn sequences_that_never_end_do_not_grow_the_state() {
    let mut policy = Foresight::within(SHAPE, 200 << 10).unwrap();
    for stream in 0..10_000u64 {
        for layer in 0..2 {
            let experts = [(stream % 20) as u32];
            policy.used(layer, &Row { stream, last: [0; 3], experts: &experts, near: &[] });
            policy.passed(layer);
        }
        assert!(policy.bytes() <= 200 << 10, "{} after {stream}", policy.bytes());
    }
    // The last ones are followed all the same: the first have been silent for long.
    let before = policy.value(0, 5);
    for _ in 0..160 {
        policy.used(0, &Row { stream: 9_999, last: [0; 3], experts: &[5], near: &[] });
        policy.passed(0);
    }
    assert!(policy.value(0, 5) > before + 0.3, "{} to {}", before, policy.value(0, 5));
}

#[test]
fn the_state_stays_within_what_it_was_given() {
    for (layers, experts) in [(8, 64), (48, 128), (61, 256), (16, 1024)] {
        let shape = Shape { layers, experts, active: 8 };
        for bytes in [1 << 20, 16 << 20] {
            let Some(policy) = Foresight::within(shape, bytes) else { continue };
            let (.., stream) = foresight::sizes(experts);
            let full = policy.bytes() + layers * stream;
            assert!(full <= bytes, "{full} of {bytes}: {shape:?}");
        }
        assert!(Foresight::within(shape, 1000).is_none());
    }
    let many = Shape { layers: 100, experts: 1 << 20, active: 8 };
    assert!(Foresight::within(many, usize::MAX).is_none());
    assert!(best(many, u64::MAX).bytes() < 1 << 20);
}

#[test]
fn a_context_tells_what_follows_it() {
    // The token before says which expert is used: 10 + that token.
    let shape = Shape { layers: 1, ..SHAPE };
    let mut policy = Foresight::within(shape, 200 << 10).unwrap();
    // Sequences that nobody said to have ended leave room for it.
    for stream in 100..400 {
        policy.used(0, &Row { stream, last: [0; 3], experts: &[1], near: &[] });
        policy.passed(0);
    }
    let mut draws = 5u64;
    let (mut right, mut token) = (0, 0);
    for t in 0..4000 {
        let before = token;
        draws = draws.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        token = (draws >> 60) as u32 % 8;
        let row = Row { stream: 1, last: [token, before, 0], experts: &[10 + before], near: &[] };
        policy.used(0, &row);
        policy.passed(0);
        // The next token will use this.
        let best = (0..20).max_by(|&a, &b| policy.value(0, a).total_cmp(&policy.value(0, b)));
        right += u32::from(t >= 3000 && best == Some(10 + token));
    }
    assert!(right > 900, "{right} of 1000");
}

#[test]
fn what_is_used_now_is_worth_more_than_what_was_used_much_long_ago() {
    for mut policy in all() {
        for t in 0..600 {
            let experts = if t < 300 { [1, 2] } else { [3 + t % 2, 5 + t % 5] };
            policy.used(1, &Row { stream: 1, last: [0; 3], experts: &experts, near: &[] });
            policy.passed(1);
        }
        assert!(policy.value(1, 3) > policy.value(1, 1) + 0.01, "{policy:?}");
    }
}
