// Counts memory requests as a GPU makes them: one for the lanes of a warp that execute an instruction
// together.
#include <algorithm>
#include <map>
#include <tuple>

#include "control.h"
#include "state.h"

namespace emulator {
namespace {

constexpr uint64_t kSectorBytes = 32;
constexpr unsigned kBanks = 32; // of 4 bytes each

// Fibres do not run in step: the lanes' n-th executions of an instruction are taken to be one.
using RequestKey = std::tuple<Site*, unsigned, unsigned, unsigned>; // rank, warp, n
using ExecutionKey = std::tuple<Site*, const Thread*>;

std::map<RequestKey, std::vector<uint64_t>> requests; // addresses
std::map<ExecutionKey, unsigned> executions;
Module* modules = nullptr; // constant: modules register before constructors have run
std::vector<const Site*> listed;

void record(Site& site, uint64_t address, unsigned bytes, Access access, bool shared) {
  const Quiet quiet;
  const Thread& thread = *state.running;
  const unsigned n = executions[{&site, &thread}]++;
  requests[{&site, thread.at.cluster_rank, thread.at.warp, n}].push_back(address);
  site.bytes_per_lane = bytes;
  site.is_store = access != Access::load;
  site.is_shared = shared;
}

uint64_t distinct(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values.size();
}

uint64_t sectors(const std::vector<uint64_t>& addresses, unsigned bytes) {
  std::vector<uint64_t> touched;
  for (const uint64_t address : addresses) {
    for (uint64_t i = address / kSectorBytes; i <= (address + bytes - 1) / kSectorBytes; ++i)
      touched.push_back(i);
  }
  return distinct(touched);
}

// A wavefront moves one word of every bank. Wide accesses are made by half or quarter warps.
uint64_t wavefronts(const std::vector<uint64_t>& addresses, unsigned bytes) {
  const size_t lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  uint64_t total = 0;
  for (size_t first = 0; first < addresses.size(); first += lanes) {
    std::vector<uint64_t> words;
    for (size_t i = first; i < std::min(first + lanes, addresses.size()); ++i) {
      for (unsigned word = 0; word < std::max(1u, bytes / 4); ++word)
        words.push_back(addresses[i] / 4 + word);
    }
    distinct(words);
    unsigned of_bank[kBanks] = {};
    for (const uint64_t word : words) ++of_bank[word % kBanks];
    total += *std::max_element(of_bank, of_bank + kBanks);
  }
  return total;
}

template <class Visit>
void for_each_site(Visit visit) {
  for (const Module* module = modules; module != nullptr; module = module->next) {
    for (const Kernel* kernel = module->kernels; kernel->name != nullptr; ++kernel) {
      for (unsigned i = 0; i < kernel->site_count; ++i) visit(kernel->sites[i]);
    }
  }
}

} // namespace

uint64_t executed = 0;

void count_global(Site& site, uint64_t address, unsigned bytes, Access access) {
  if (kStatistics) record(site, address, bytes, access, false);
}

void count_shared(Site& site, uint64_t offset, unsigned bytes, Access access) {
  if (kStatistics) record(site, offset, bytes, access, true);
}

// A block has ended, and with it all requests of its warps.
void finish_requests() {
  for (const auto& [key, addresses] : requests) {
    Site& site = *std::get<0>(key);
    ++site.requests;
    site.lanes += addresses.size();
    if (site.is_shared) {
      site.wavefronts += wavefronts(addresses, site.bytes_per_lane);
    } else {
      site.sectors += sectors(addresses, site.bytes_per_lane);
    }
  }
  requests.clear();
  executions.clear();
}

void add_module(Module& module) {
  module.next = modules;
  modules = &module;
}

} // namespace emulator

// Control

using emulator::options;

void emulator_set_order(int order) {
  options.order = static_cast<emulator::Order>(order);
}

void emulator_set_seed(uint64_t seed) {
  options.seed = seed;
}

void emulator_check_unwritten(int check) {
  options.check_unwritten = check != 0;
}

void emulator_reset_statistics() {
  emulator::executed = 0;
  emulator::for_each_site(
      [](emulator::Site& site) { site.requests = site.lanes = site.sectors = site.wavefronts = 0; });
}

uint64_t emulator_executed() {
  return emulator::executed;
}

int emulator_count_sites() {
  emulator::listed.clear();
  emulator::for_each_site([](emulator::Site& site) {
    if (site.requests > 0) emulator::listed.push_back(&site);
  });
  return static_cast<int>(emulator::listed.size());
}

void emulator_read_site(int index, EmulatorSite* out) {
  const emulator::Site& site = *emulator::listed[index];
  *out = {site.kernel,   site.file,           site.instruction, site.line,  site.is_shared,
          site.is_store, site.bytes_per_lane, site.requests,    site.lanes, site.lanes * site.bytes_per_lane,
          site.sectors,  site.wavefronts};
}
