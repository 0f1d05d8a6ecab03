#include "tests/simt/coverage/symbols.h"

#include <elf.h>
#include <link.h>

#include <cstdint>
#include <fstream>
#include <vector>

namespace attamba::simt {

namespace {

template <class T>
std::vector<T> read(std::ifstream& file, std::uint64_t offset, std::uint64_t bytes) {
  std::vector<T> values(bytes / sizeof(T));
  file.seekg(static_cast<std::streamoff>(offset));
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
  return values;
}

/// Where the program's file lies in memory: what to add to the addresses of its symbols.
std::uint64_t load_address() {
  std::uint64_t address = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* to) {
        *static_cast<std::uint64_t*>(to) = info->dlpi_addr;
        return 1;  // the first one is the program
      },
      &address);
  return address;
}

}  // namespace

std::map<const void*, std::string> symbol_names(const std::set<const void*>& functions) {
  std::map<const void*, std::string> names;
  for (const void* function : functions) {
    names[function] = "?";
  }
  std::ifstream file("/proc/self/exe", std::ios::binary);
  const Elf64_Ehdr header = read<Elf64_Ehdr>(file, 0, sizeof(Elf64_Ehdr)).at(0);
  const auto sections = read<Elf64_Shdr>(file, header.e_shoff, header.e_shnum * sizeof(Elf64_Shdr));
  const std::uint64_t base = load_address();
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB) {
      continue;
    }
    const Elf64_Shdr& strings = sections.at(section.sh_link);
    const auto text = read<char>(file, strings.sh_offset, strings.sh_size);
    for (const Elf64_Sym& symbol : read<Elf64_Sym>(file, section.sh_offset, section.sh_size)) {
      const auto name = names.find(reinterpret_cast<const void*>(base + symbol.st_value));
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && name != names.end()) {
        name->second = &text.at(symbol.st_name);
      }
    }
  }
  return names;
}

}  // namespace attamba::simt
