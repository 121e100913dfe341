// Stands for libnvrtc.so.13 where there is no GPU: a kernel's source becomes a library for the host, which
// driver.cpp loads. Needs g++.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>
#include <unistd.h>

namespace {

struct Program { std::string source, log, code; };

// The device's own functions, which device.h has.
const char* OWN[] = {"stream", "stream8", "stream16", "begin", "begin_early", "ask", "barrier_init", "barriers_made", "barrier_expect",
                     "bulk_copy", "barrier_wait", "copy16", "copy16_of", "copies_end", "copies_wait", "four_matrices", "dots16", "dots",
                     "dp4a", "rounded", "exp2_", "wide_begin", "wide_end", "wide_wait", "wide_show", "wide_sum", "wide_dots"};

// Takes out `DI type name(..) { .. }`, and what is a template before it.
void take_out(std::string& text, const std::string& name) {
  std::regex head("\\n(template <int N> )?DI [\\w]+ " + name + "\\(");
  std::smatch found;
  while (std::regex_search(text, found, head)) {
    size_t from = found.position(), at = text.find('{', from);
    if (at == std::string::npos) return;
    int depth = 0;
    for (; at < text.size(); at++) {
      if (text[at] == '"') { do at++; while (text[at] != '"' || text[at - 1] == '\\'); continue; }
      if (text[at] == '{') depth++;
      if (text[at] == '}' && --depth == 0) break;
    }
    text.erase(from, at + 1 - from);
  }
}

std::string folder() {
  Dl_info info;
  dladdr((void*)&folder, &info);
  std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

bool run(const std::string& command, Program& p, const std::string& log) {
  if (std::system((command + " 2>" + log).c_str()) == 0) return true;
  p.log = read(log);
  return false;
}

bool build(Program& p) {
  std::string text = p.source;
  for (const char* name : OWN) take_out(text, name);
  text = std::regex_replace(text, std::regex("extern __shared__ float4 memory\\[\\];"), "float4* memory = (float4*)rt->shared;");
  char name[] = "/tmp/lite-llm-host-XXXXXX";
  if (!mkdtemp(name)) { p.log = "no temporary folder"; return false; }
  std::string at = name, log = at + "/log";
  std::ofstream(at + "/k.cpp") << "#include \"device.h\"\n" << text;
  bool good = run("g++ -std=c++20 -E -P -I" + folder() + " " + at + "/k.cpp -o " + at + "/e.cpp", p, log);
  if (good) {
    text = read(at + "/e.cpp");
    std::regex entry("extern \"C\" __global__ void\\s+(\\w+)\\(");
    std::string table;
    for (std::sregex_iterator i(text.begin(), text.end(), entry), end; i != end; ++i)
      table += "{\"" + (*i)[1].str() + "\", [](void** args) { call(" + (*i)[1].str() + ", args); }, [](void** args) { return keep(" +
               (*i)[1].str() + ", args); }},\n";
    text = std::regex_replace(text, std::regex("__global__ "), "");
    std::ofstream(at + "/e.cpp") << text << "\nextern \"C\" const Entry host_entries[] = {\n" << table << "{nullptr, nullptr, nullptr}};\n";
    good = run("g++ -std=c++20 -O2 -march=native -ffp-contract=off -fno-strict-aliasing -w -fPIC -shared " + at + "/e.cpp -o " + at + "/k.so", p, log);
  }
  if (good) p.code = read(at + "/k.so");
  if (!std::getenv("LITE_LLM_HOST_KEEP")) std::system(("rm -r " + at).c_str());
  return good;
}

}  // namespace

extern "C" {
int nvrtcVersion(int* major, int* minor) { *major = 0; *minor = 1; return 0; }
const char* nvrtcGetErrorString(int) { return "the host's compiler failed"; }
int nvrtcCreateProgram(Program** p, const char* source, const char*, int, const char* const*, const char* const*) { *p = new Program{source, {}, {}}; return 0; }
int nvrtcDestroyProgram(Program** p) { delete *p; *p = nullptr; return 0; }
int nvrtcCompileProgram(Program* p, int, const char* const*) { return build(*p) ? 0 : 6; }
int nvrtcGetProgramLogSize(Program* p, size_t* size) { *size = p->log.size() + 1; return 0; }
int nvrtcGetProgramLog(Program* p, char* to) { std::memcpy(to, p->log.c_str(), p->log.size() + 1); return 0; }
int nvrtcGetCUBINSize(Program* p, size_t* size) { *size = p->code.size(); return 0; }
int nvrtcGetCUBIN(Program* p, char* to) { std::memcpy(to, p->code.data(), p->code.size()); return 0; }
}
