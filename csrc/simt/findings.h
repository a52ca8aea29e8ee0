// The reports of faults that were found in a launch.
#pragma once

#include <string>

#include "block.h"

namespace simt {

// Return a placeholder for a source line, which is looked up when the report is thrown.
std::string source(uintptr_t pc);
std::string source_of(uint32_t site);
std::string thread_name(int id, Index block);

// Adds a finding. Each kind is reported once for the same two places. After a number of findings
// the launch stops.
void report(const std::string& kind, const std::string& what, uintptr_t pc, uint32_t other);
// Reports that threads wait for others that will never arrive.
void report_deadlock();
// Throws std::runtime_error with all findings, if there are any.
void throw_findings();

}  // namespace simt
