#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>

#include "src/chunking/chunking.h"
#include "src/core/error.h"

namespace attamba {
namespace {

using Ends = std::vector<std::int32_t>;

/// Ends that the caller gave, per layer.
class Explicit final : public ChunkingStrategy {
 public:
  explicit Explicit(std::vector<Ends> ends) : ends_(std::move(ends)) {}
  void ends(const ChunkRequest& request, std::vector<std::int32_t>& out) const override {
    require<UsageError>(request.layer < static_cast<std::int64_t>(ends_.size()), "explicit chunking: no chunk ends for layer ",
                        request.layer, "; give one list per layer");
    const Ends& list = ends_[static_cast<std::size_t>(request.layer)];
    require<UsageError>(list.back() == request.length - 1, "explicit chunking: the list for layer ", request.layer, " ends at ",
                        list.back(), ", a document of ", request.length, " tokens ends at ", request.length - 1,
                        "; explicit ends do not go with document_mask");
    out.insert(out.end(), list.begin(), list.end());
  }
  /// The first layer that has the same list.
  std::int64_t layer_class(std::int64_t layer) const override {
    return std::find(ends_.begin(), ends_.end(), ends_.at(static_cast<std::size_t>(layer))) - ends_.begin();
  }

 private:
  std::vector<Ends> ends_;
};

void check_ends(const Ends& ends, std::size_t layer, std::int64_t n, std::string_view source) {
  require<UsageError>(!ends.empty(), source, ": layer ", layer, " has no chunk ends; give at least n - 1 = ", n - 1,
                      ", which always ends a chunk");
  for (std::size_t i = 0; i < ends.size(); ++i) {
    require<UsageError>(ends[i] >= 0 && ends[i] < n, source, ": chunk end ", ends[i], " of layer ", layer,
                        " lies outside a sequence of ", n, " tokens; use positions from 0 to ", n - 1);
    const std::int32_t previous = i == 0 ? -1 : ends[i - 1];
    require<UsageError>(previous != ends[i], source, ": chunk end ", ends[i], " of layer ", layer,
                        " stands there twice; list each position once");
    require<UsageError>(previous < ends[i], source, ": chunk ends of layer ", layer, " are not sorted: ", previous, " before ",
                        ends[i], "; list them in increasing order");
  }
  require<UsageError>(ends.back() == n - 1, source, ": the last chunk end of layer ", layer, " is ", ends.back(),
                      ", but position n - 1 = ", n - 1, " always ends a chunk; add it to the list");
}

/// Whole numbers between blanks and commas, up to a '#'.
Ends parse_ends(std::string_view line, std::size_t layer, std::int64_t n, std::string_view source) {
  constexpr std::string_view kBetween = " \t\r,";
  line = line.substr(0, line.find('#'));
  Ends ends;
  for (std::size_t begin = line.find_first_not_of(kBetween); begin != std::string_view::npos;
       begin = line.find_first_not_of(kBetween, begin)) {
    const std::size_t end = std::min(line.find_first_of(kBetween, begin), line.size());
    const std::string_view word = line.substr(begin, end - begin);
    std::int32_t position = 0;
    const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), position);
    require<UsageError>(error != std::errc::result_out_of_range, source, ": chunk end ", word, " of layer ", layer,
                        " lies outside a sequence of ", n, " tokens; use positions from 0 to ", n - 1);
    require<UsageError>(error == std::errc() && stop == word.data() + word.size(), source, ": \"", word, "\" of layer ", layer,
                        " is not a position; write whole numbers from 0 to ", n - 1, " between blanks or commas");
    ends.push_back(position);
    begin = end;
  }
  return ends;
}

}  // namespace

std::unique_ptr<ChunkingStrategy> make_explicit_chunking(std::vector<Ends> ends_of_layer, std::int64_t n,
                                                         std::string_view source) {
  for (std::size_t layer = 0; layer < ends_of_layer.size(); ++layer) {
    check_ends(ends_of_layer[layer], layer, n, source);
  }
  return std::make_unique<Explicit>(std::move(ends_of_layer));
}

std::unique_ptr<ChunkingStrategy> read_explicit_chunking(const std::filesystem::path& file, std::int64_t layers,
                                                         std::int64_t n) {
  std::ifstream in(file);
  require<UsageError>(in && !std::filesystem::is_directory(file), file.string(),
                      ": cannot read chunk ends: ", in ? "it is a folder" : std::strerror(errno),
                      "; model.chunking.ends_file names a text file");
  std::vector<Ends> lists;
  for (std::string line; std::getline(in, line);) {
    if (Ends ends = parse_ends(line, lists.size(), n, file.string()); !ends.empty()) {
      lists.push_back(std::move(ends));
    }
  }
  require<UsageError>(!lists.empty(), file.string(), ": holds no chunk ends; write one line for all layers, or one per layer");
  require<UsageError>(lists.size() == 1 || static_cast<std::int64_t>(lists.size()) == layers, file.string(), ": holds ",
                      lists.size(), " lists of chunk ends for model.n_layers = ", layers,
                      "; write one line for all layers, or one per layer");
  lists.resize(static_cast<std::size_t>(layers), lists.front());
  return make_explicit_chunking(std::move(lists), n, file.string());
}

}  // namespace attamba
