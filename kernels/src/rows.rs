//! Rows of activations, wherever they lie.
