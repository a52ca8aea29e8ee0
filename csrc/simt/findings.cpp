#include "findings.h"

#include "stamp.h"

#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace simt {
namespace {

constexpr size_t kEnough = 8;
std::vector<std::string> findings;
std::set<std::tuple<std::string, uint32_t, uint32_t>> reported;

const Dl_info& library() {
  static const Dl_info info = [] {
    Dl_info found = {};
    dladdr(reinterpret_cast<void*>(&throw_findings), &found);
    return found;
  }();
  return info;
}

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%x", value);
  return text;
}

struct Frame {
  std::string function, line;
};

// Asks addr2line for the functions that are inlined at each site, from the inside out.
std::map<uint32_t, std::vector<Frame>> look_up(const std::set<uint32_t>& sites) {
  std::string command = std::string("addr2line -a -f -i -C -e '") + library().dli_fname + "'";
  for (const uint32_t s : sites) command += " " + hex(s);
  std::map<uint32_t, std::vector<Frame>> frames;
  FILE* const pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return frames;
  std::string text;
  for (int c; (c = std::fgetc(pipe)) != EOF;) text += static_cast<char>(c);
  pclose(pipe);
  std::istringstream lines(text);
  std::vector<Frame>* current = nullptr;
  for (std::string line, next; std::getline(lines, line);) {
    if (line.rfind("0x", 0) == 0) {
      current = &frames[static_cast<uint32_t>(std::stoul(line, nullptr, 16))];
    } else if (current && std::getline(lines, next)) {
      for (const char* root : {"/csrc/", "/tests/"}) {
        const size_t at = next.find(root);
        if (at != std::string::npos) next = next.substr(at + 1);
      }
      for (size_t up; (up = next.find("/../")) != std::string::npos;) {
        const size_t folder = next.rfind('/', up - 1) + 1;
        next.erase(folder, up + 4 - folder);
      }
      current->push_back({line, next.substr(0, next.find(" (disc"))});
    }
  }
  return frames;
}

std::string describe(const std::vector<Frame>& frames) {
  std::string text;
  size_t shown = 0;
  for (const Frame& f : frames) {
    if (f.line.find("simt/device.h") != std::string::npos || shown == 5) continue;
    text += (shown++ ? " < " : "") + f.line;
  }
  return text;
}

// Replaces the placeholders of source() by source lines.
std::string with_lines(const std::string& text) {
  std::set<uint32_t> sites;
  for (size_t at = 0; (at = text.find("[@", at)) != std::string::npos; ++at) {
    sites.insert(static_cast<uint32_t>(std::stoul(text.substr(at + 2), nullptr, 16)));
  }
  const auto frames = look_up(sites);
  std::string result;
  for (size_t at = 0; at < text.size();) {
    const size_t next = text.find("[@", at);
    result += text.substr(at, next - at);
    if (next == std::string::npos) break;
    const auto site = static_cast<uint32_t>(std::stoul(text.substr(next + 2), nullptr, 16));
    const auto found = frames.find(site);
    result += "[" + (found == frames.end() ? hex(site) : describe(found->second)) + "]";
    at = text.find(']', next) + 1;
  }
  return result;
}

std::string kernel_name() {
  const auto entry = reinterpret_cast<uintptr_t>(state.launch->kernel) - library_begin;
  const auto frames = look_up({static_cast<uint32_t>(entry)});
  if (frames.empty() || frames.begin()->second.empty()) return hex(static_cast<uint32_t>(entry));
  return frames.begin()->second.back().function;
}

const char* describe(Wait wait) {
  switch (wait) {
    case Wait::kNothing:
      return "can run";
    case Wait::kEnd:
      return "ended";
    case Wait::kBarrier:
      return "wait in __syncthreads";
    case Wait::kSyncwarp:
      return "wait in __syncwarp";
    case Wait::kShuffle:
      return "wait in a shuffle";
    case Wait::kBallot:
      return "wait in __ballot_sync";
    case Wait::kLdmatrix:
      return "wait in ldmatrix";
    case Wait::kMma:
      return "wait in mma";
  }
  return "";
}

std::string text_of(Index i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

}  // namespace

uintptr_t library_begin = reinterpret_cast<uintptr_t>(library().dli_fbase);

std::string source_of(uint32_t site) { return "[@" + hex(site) + "]"; }
std::string source(uintptr_t pc) { return source_of(site(pc)); }

std::string thread_name(int id, Index block) {
  return "thread " + std::to_string(id) + " of block " + text_of(block);
}

void report(const std::string& kind, const std::string& what, uintptr_t pc, uint32_t other) {
  if (!reported.insert({kind, site(pc), other}).second) return;
  findings.push_back(kind + ": " + what);
  if (findings.size() >= kEnough) state.stopped = true;
}

void report_deadlock() {
  std::map<std::pair<Wait, uintptr_t>, int> groups;
  for (int id = 0; id < state.threads; ++id) {
    const Thread& t = state.thread[id];
    const bool somewhere = t.wait != Wait::kNothing && t.wait != Wait::kEnd;
    ++groups[{t.wait, somewhere ? t.pc : 0}];
  }
  std::string text = "not all threads come together in block " + text_of(state.block) + ": of " +
                     std::to_string(state.threads) + " threads";
  const char* separator = " ";
  for (const auto& [group, count] : groups) {
    text += separator + std::to_string(count) + " " + describe(group.first);
    if (group.second) text += " " + source(group.second);
    separator = ", ";
  }
  report("deadlock", text, 0, 0);
}

void throw_findings() {
  if (findings.empty()) return;
  std::string text = "simt: " + kernel_name() + " (SIMT_SEED=" + std::to_string(state.seed) + ")\n";
  for (const std::string& f : findings) text += "  " + f + "\n";
  findings.clear();
  reported.clear();
  throw std::runtime_error(with_lines(text));
}

}  // namespace simt
