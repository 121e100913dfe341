//! Typed payloads of messages that may cross to another process.
//!
//! ractor drops a message whose decoding panics without a word, so decoding here never panics:
//! a damaged payload arrives as an error that the handler must look at.

use lite_llm_transport::messages::{self, MessageError};
use ractor_cluster::BytesConvertable;

/// A value that travels as checked rkyv bytes.
#[derive(Debug)]
pub struct Wire<T>(Result<T, MessageError>);

impl<T> Wire<T> {
    /// Wraps a value to be sent.
    pub fn new(value: T) -> Self {
        Self(Ok(value))
    }

    /// The value, or why it could not be read.
    pub fn into_inner(self) -> Result<T, MessageError> {
        self.0
    }
}

impl<T: messages::Wire> BytesConvertable for Wire<T> {
    fn into_bytes(self) -> Vec<u8> {
        self.0.map(|value| messages::encode(&value)).unwrap_or_default()
    }

    fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(messages::decode(&bytes))
    }
}

#[cfg(test)]
mod tests {
    use lite_llm_transport::messages::NodeAddress;

    use super::*;

    #[test]
    fn damaged_bytes_arrive_as_an_error() {
        let value = NodeAddress { name: "w1".into(), address: "[::1]:7".into() };
        let bytes = Wire::new(value.clone()).into_bytes();
        assert_eq!(Wire::<NodeAddress>::from_bytes(bytes.clone()).into_inner().unwrap(), value);
        for length in 0..bytes.len() {
            let cut = Wire::<NodeAddress>::from_bytes(bytes[..length].to_vec());
            assert!(cut.into_inner().is_err(), "{length} of {} bytes", bytes.len());
        }
    }
}
