#include "tests/cuda/cubin.h"

#include <elf.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <span>
#include <string_view>

#include "src/core/error.h"

namespace attamba {

namespace {

constexpr unsigned kKernelSymbol = 0x10;
/// Attributes of kernels, as cuobjdump -elf names them (EIATTR_...).
enum Attribute : std::uint8_t { max_threads = 0x05, frame_size = 0x11, maxreg_count = 0x1b, regcount = 0x2f };
/// How an attribute's value is stored: two bytes of its head, or as many bytes after it as these two say.
enum Format : std::uint8_t { half_word = 3, sized = 4 };

template <class T>
T read(std::span<const std::byte> bytes, std::size_t offset) {
  require(offset + sizeof(T) <= bytes.size(), "a file of machine code ends early");
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

class Elf {
 public:
  explicit Elf(std::span<const std::byte> bytes) : bytes_(bytes), header_(read<Elf64_Ehdr>(bytes, 0)) {
    for (std::size_t i = 0; i < header_.e_shnum; ++i) {
      sections_.push_back(read<Elf64_Shdr>(bytes, header_.e_shoff + i * sizeof(Elf64_Shdr)));
    }
  }
  const Elf64_Ehdr& header() const { return header_; }
  const std::vector<Elf64_Shdr>& sections() const { return sections_; }
  std::span<const std::byte> contents(const Elf64_Shdr& section) const {
    require(section.sh_offset + section.sh_size <= bytes_.size(), "a file of machine code ends early");
    return bytes_.subspan(section.sh_offset, section.sh_size);
  }
  std::string_view name(const Elf64_Shdr& section) const { return text(sections_.at(header_.e_shstrndx), section.sh_name); }
  std::string_view text(const Elf64_Shdr& strings, std::size_t offset) const {
    return reinterpret_cast<const char*>(contents(strings).subspan(offset).data());
  }
  const Elf64_Shdr* find(std::string_view wanted) const {
    for (const Elf64_Shdr& section : sections_) {
      if (name(section) == wanted) {
        return &section;
      }
    }
    return nullptr;
  }

 private:
  std::span<const std::byte> bytes_;
  Elf64_Ehdr header_;
  std::vector<Elf64_Shdr> sections_;
};

/// Calls body(attribute, value): the value's bytes, or the two of the head.
template <class Body>
void for_each_attribute(std::span<const std::byte> info, const Body& body) {
  for (std::size_t at = 0; at + 4 <= info.size();) {
    const auto format = read<std::uint8_t>(info, at), attribute = read<std::uint8_t>(info, at + 1);
    const std::size_t size = format == sized ? read<std::uint16_t>(info, at + 2) : 0;
    require(at + 4 + size <= info.size(), "a list of kernels' attributes ends early");
    if (format == sized) {
      body(attribute, info.subspan(at + 4, size));
    } else if (format == half_word) {
      body(attribute, info.subspan(at + 2, 2));
    }
    at += 4 + size;
  }
}

/// Before CUDA 13 the architecture lay in the lowest byte of the flags.
int architecture_of(const Elf64_Ehdr& header) {
  return static_cast<int>((header.e_ident[EI_ABIVERSION] >= 8 ? header.e_flags >> 8 : header.e_flags) & 0xff);
}

/// What is said of a kernel in sections of its own.
void read_own_sections(const Elf& cubin, CompiledKernel& kernel) {
  const Elf64_Shdr* const info = cubin.find(".nv.info." + kernel.name);
  require(info != nullptr, kernel.name, ": its attributes are missing");
  for_each_attribute(cubin.contents(*info), [&](std::uint8_t attribute, std::span<const std::byte> value) {
    if (attribute == maxreg_count) {
      kernel.most_registers = read<std::uint16_t>(value, 0);
    } else if (attribute == max_threads) {
      kernel.threads = read<std::int32_t>(value, 0) * read<std::int32_t>(value, 4) * read<std::int32_t>(value, 8);
    }
  });
  if (const Elf64_Shdr* const shared = cubin.find(".nv.shared." + kernel.name); shared != nullptr) {
    kernel.shared_bytes = shared->sh_size;
  }
  require(kernel.registers > 0 && kernel.most_registers > 0, kernel.name, ": its attributes lack registers");
}

void add_kernels(const Elf& cubin, std::vector<CompiledKernel>& kernels) {
  const Elf64_Shdr *const symbols = cubin.find(".symtab"), *const info = cubin.find(".nv.info");
  if (symbols == nullptr || info == nullptr) {
    return;  // a source file without kernels
  }
  std::map<std::uint32_t, CompiledKernel> by_symbol;
  for (std::size_t i = 0; i * sizeof(Elf64_Sym) < symbols->sh_size; ++i) {
    const auto symbol = read<Elf64_Sym>(cubin.contents(*symbols), i * sizeof(Elf64_Sym));
    if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && (symbol.st_other & kKernelSymbol) != 0) {
      CompiledKernel& kernel = by_symbol[static_cast<std::uint32_t>(i)];
      kernel.name = cubin.text(cubin.sections().at(symbols->sh_link), symbol.st_name);
      kernel.architecture = architecture_of(cubin.header());
    }
  }
  for_each_attribute(cubin.contents(*info), [&](std::uint8_t attribute, std::span<const std::byte> value) {
    if (attribute != regcount && attribute != frame_size) {
      return;
    }
    const auto kernel = by_symbol.find(read<std::uint32_t>(value, 0));
    if (kernel != by_symbol.end() && attribute == regcount) {
      kernel->second.registers = read<std::int32_t>(value, 4);
    } else if (kernel != by_symbol.end()) {
      kernel->second.local_bytes = read<std::uint32_t>(value, 4);
    }
  });
  for (auto& [index, kernel] : by_symbol) {
    read_own_sections(cubin, kernel);
    kernels.push_back(std::move(kernel));
  }
}

/// Calls body(bytes) for each file of machine code in a section of them. Such a section is a row of containers, each with a
/// head (magic number, version, size of the head, size of what follows) and entries that have one, too: kind, size of the head,
/// size of the file, and that of its contents where these are compressed.
template <class Body>
void for_each_cubin(std::span<const std::byte> section, const Body& body) {
  constexpr std::uint32_t kMagic = 0xba55ed50;
  constexpr std::uint16_t kMachineCode = 2;
  constexpr std::size_t kAlignment = 8;
  for (std::size_t at = 0; at + 16 <= section.size();) {
    if (read<std::uint32_t>(section, at) != kMagic) {
      at += kAlignment;  // between containers
      continue;
    }
    const std::size_t begin = at + read<std::uint16_t>(section, at + 6), end = begin + read<std::uint64_t>(section, at + 8);
    require(end > at && end <= section.size(), "a container of machine code ends early");
    for (std::size_t entry = begin; entry < end;) {
      const std::size_t contents = entry + read<std::uint32_t>(section, entry + 4);
      const std::size_t size = read<std::uint64_t>(section, entry + 8);
      require(contents > entry && contents <= end && size <= end - contents, "a container of machine code ends early");
      if (read<std::uint16_t>(section, entry) == kMachineCode) {
        require(read<std::uint32_t>(section, entry + 16) == 0,
                "machine code is compressed, so kernels cannot be checked; nvcc keeps it as it is with --no-compress");
        body(section.subspan(contents, size));
      }
      entry = contents + size;
    }
    at = end;
  }
}

}  // namespace

std::vector<CompiledKernel> compiled_kernels(const std::filesystem::path& program) {
  std::vector<char> bytes(std::filesystem::file_size(program));
  require(std::ifstream(program, std::ios::binary).read(bytes.data(), static_cast<std::streamsize>(bytes.size())).good(),
          "could not read ", program.string());
  const Elf host(std::as_bytes(std::span(bytes)));
  std::vector<CompiledKernel> kernels;
  for (const Elf64_Shdr& section : host.sections()) {
    if (host.name(section) != ".nv_fatbin") {
      continue;
    }
    for_each_cubin(host.contents(section), [&](std::span<const std::byte> cubin) { add_kernels(Elf(cubin), kernels); });
  }
  require(!kernels.empty(), program.string(), ": no kernels found; was it built without CUDA?");
  return kernels;
}

}  // namespace attamba
