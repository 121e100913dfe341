//! Nothing: the stories are the files beside this folder, run with `cargo run --example NAME -p lite-llm-examples`.
