#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "data/sha256.h"
#include "data/utf8.h"
#include "src/core/crc32c.h"
#include "src/core/random.h"

namespace attamba {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

TEST(Crc32c, MatchesPublishedValues) {
  EXPECT_EQ(crc32c(bytes_of("123456789")), 0xe3069283u);
  EXPECT_EQ(crc32c_portable(bytes_of("123456789")), 0xe3069283u);
  EXPECT_EQ(crc32c({}), 0u);
  // RFC 3720, B.4.
  EXPECT_EQ(crc32c(std::vector<std::byte>(32, std::byte{0})), 0x8a9136aau);
  EXPECT_EQ(crc32c(std::vector<std::byte>(32, std::byte{0xff})), 0x62a8ab43u);
}

TEST(Crc32c, InstructionAgreesWithTablesAtEveryLengthAndCut) {
  RandomStream random(1);
  std::vector<std::byte> bytes(10000);
  for (auto& byte : bytes) {
    byte = static_cast<std::byte>(random.next());
  }
  const std::span<const std::byte> all(bytes);
  for (std::size_t length = 0; length < bytes.size(); length += length < 40 ? 1 : 401) {
    const auto part = all.subspan(length % 7, length - std::min(length, length % 7));
    const std::uint32_t whole = crc32c(part);
    EXPECT_EQ(whole, crc32c_portable(part)) << length;
    const std::size_t cut = part.empty() ? 0 : random.below(part.size());
    EXPECT_EQ(whole, crc32c(part.subspan(cut), crc32c(part.first(cut)))) << length << " cut at " << cut;
    EXPECT_EQ(whole, crc32c_combine(crc32c(part.first(cut)), crc32c(part.subspan(cut)), part.size() - cut)) << length;
  }
}

TEST(Sha256, MatchesPublishedValues) {
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Utf8, FindsTheFirstByteThatIsNotText) {
  EXPECT_EQ(first_invalid_utf8("plain text, über 语 \xf0\x9f\x98\x80"),
            std::string("plain text, über 语 \xf0\x9f\x98\x80").size());
  const std::vector<std::string> invalid = {
      "\x80",              // a continuation byte alone
      "\xc0\xaf",          // overlong
      "\xe0\x80\xaf",      // overlong
      "\xf0\x80\x80\xaf",  // overlong
      "\xed\xa0\x80",      // a surrogate
      "\xf4\x90\x80\x80",  // above U+10FFFF
      "\xf5\x80\x80\x80",
      "\xff",
      "\xe8\xaf",
      "\xc3",
  };
  for (const auto& bad : invalid) {
    for (const std::string before : {"", "x", "eight by", "语 and more text before it"}) {
      EXPECT_EQ(first_invalid_utf8(before + bad), before.size()) << before;
      EXPECT_EQ(first_invalid_utf8(before + bad + "z"), before.size()) << before;
    }
  }
}

TEST(Utf8, CountsWordsAcrossCuts) {
  const std::string text = "  two words\n\tand\vthree more\r\n";
  EXPECT_EQ(count_words(text), 5u);
  for (std::size_t cut = 1; cut < text.size(); ++cut) {
    EXPECT_EQ(count_words(text.substr(0, cut)) + count_words(text.substr(cut), !is_space(text[cut - 1])), 5u) << cut;
  }
}

}  // namespace
}  // namespace attamba
