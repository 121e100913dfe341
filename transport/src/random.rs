//! Random bytes of the system, where chance is wanted: secrets, numbers of certificates, pauses.

use std::time::Duration;

/// Fills with random bytes.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<(), String> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let filled = provider.secure_random.fill(bytes);
    filled.map_err(|_| "the system has no randomness".to_owned())
}

/// Between half of a pause and one and a half of it, so that those who wait don't come together.
pub(crate) fn jittered(pause: Duration) -> Duration {
    let mut byte = [128];
    // Without randomness everybody waits equally long.
    let _ = fill(&mut byte);
    pause.mul_f64(0.5 + f64::from(byte[0]) / 255.0)
}
