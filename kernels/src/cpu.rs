//! The CPU as a [`crate::device::Device`].
