//! Lists the files of the model that is built into the program.

use std::{env, fmt::Write, fs, path::Path};

fn main() {
    let demo = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"))
        .join("../models/manpages-moe");
    println!("cargo:rerun-if-changed={}", demo.display());
    let mut files = Vec::new();
    list(&demo, "", &mut files);
    files.sort();
    let mut code = String::from("&[\n");
    for name in files {
        let path = demo.join(&name);
        writeln!(code, "    ({name:?}, include_bytes!({path:?})),").expect("strings grow");
    }
    code.push(']');
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("demo_files.rs");
    fs::write(out, code).expect("OUT_DIR can be written");
}

fn list(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("the demo model is part of the repository") {
        let entry = entry.expect("its folder can be read");
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            list(&entry.path(), &format!("{name}/"), files);
        } else if !name.ends_with(".md") {
            files.push(name);
        }
    }
}
