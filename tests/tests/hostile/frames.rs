//! Frames as bytes: headers that say anything, bodies that are anything.

use lite_llm_transport::connection::{RawReceiver, RawSender};

/// Kinds of frames, as they stand on the wire.
pub(crate) const EXPERT_BATCH: u16 = 1;
pub(crate) const EXPERT_OUTPUTS: u16 = 2;
pub(crate) const EXPERT_FAILURE: u16 = 3;
pub(crate) const JOB_EVENT: u16 = 4;
pub(crate) const CLIENT_REQUEST: u16 = 5;
pub(crate) const CLIENT_REPLY: u16 = 6;
pub(crate) const JOB_ORDER: u16 = 12;

/// A frame of some kind.
pub(crate) type Raw = (u16, Vec<u8>);

/// A frame whose header says what it likes, and the bytes after it.
pub(crate) fn claimed(len: u32, kind: u32, body: &[u8]) -> Vec<u8> {
    [&len.to_le_bytes()[..], &kind.to_le_bytes(), body].concat()
}

/// Writes a frame. Whether it was taken is of no interest: the other side may have hung up.
pub(crate) async fn write(sender: &mut RawSender, (kind, body): &Raw) -> bool {
    sender.write_all(&claimed(body.len() as u32, u32::from(*kind), body)).await.is_ok()
}

/// The next frame, or nothing when the stream or its connection has ended.
pub(crate) async fn read(receiver: &mut RawReceiver) -> Option<Raw> {
    let mut header = [0; 8];
    receiver.read_exact(&mut header).await.ok()?;
    let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut body = vec![0; len as usize];
    receiver.read_exact(&mut body).await.ok()?;
    Some((u16::from_le_bytes([header[4], header[5]]), body))
}

/// Headers and bodies that are no frame at all, or less than one.
pub(crate) fn no_frames() -> Vec<Vec<u8>> {
    let mut all = vec![vec![], vec![0], vec![0xff; 7], b"GET / HTTP/1.1\r\n\r\n".to_vec()];
    for kind in [0, 9, 99, u32::from(u16::MAX), u32::MAX, 1 << 16 | 5] {
        all.push(claimed(4, kind, &[0; 4]));
    }
    for kind in 1..=8 {
        // Lengths at and beyond limits, without the bytes.
        for len in [0, 1, 64 << 20, (64 << 20) + 1, u32::MAX, i32::MAX as u32] {
            all.push(claimed(len, kind, &[]));
            all.push(claimed(len, kind, &[7; 3]));
        }
    }
    all
}
