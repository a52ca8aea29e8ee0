// What was found in a launch, in words.
#pragma once

#include <string>

#include "block.h"

namespace simt {

// Stands in a report for the source line, which is looked up only if there is something to report.
std::string source(uintptr_t pc);
std::string source_of(uint32_t site);
std::string thread_name(int id, Index block);

// A kind at the same two places is reported once. After a number of findings, the launch
// stops.
void report(const std::string& kind, const std::string& what, uintptr_t pc, uint32_t other);
// Threads that wait for others that will not come.
void report_deadlock();
// Throws std::runtime_error if there is anything.
void throw_findings();

}  // namespace simt
