#include "src/models/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "src/core/error.h"

namespace attamba {
namespace {

using testing::AllOf;
using testing::HasSubstr;

/// The suffix of a parameterised test's name.
constexpr auto name_of_case = [](const auto& test) { return std::string(test.param.name); };

SsmConfig paper_ssm(std::int64_t hidden, std::int64_t state, std::int64_t heads = 8, std::int64_t groups = 1) {
  SsmConfig ssm;
  ssm.hidden = hidden;
  ssm.state = state;
  ssm.heads = heads;
  ssm.groups = groups;
  return ssm;
}

// ---------------------------------------------------------------------------------------------- published counts

struct Count {
  const char* name;
  std::function<void(ModelConfig&)> change;
  std::int64_t parameters;
};

class ParameterCount : public testing::TestWithParam<Count> {};

TEST_P(ParameterCount, IsThePublishedOne) {
  ModelConfig config;
  GetParam().change(config);
  EXPECT_EQ(parameter_count(config), GetParam().parameters);
}

INSTANTIATE_TEST_SUITE_P(Published, ParameterCount,
                         testing::Values(Count{"attamba_state_32", [](ModelConfig&) {}, 62'751'488},
                                         Count{"attamba_state_128", [](ModelConfig& c) { c.ssm.state = 128; }, 64'336'640},
                                         Count{"attamba_kv_proj_state_128",
                                               [](ModelConfig& c) {
                                                 c.ssm.state = 128;
                                                 c.kv_proj = true;
                                               },
                                               68'539'136 - 8'192},
                                         Count{"transformer", [](ModelConfig& c) { c.kind = "transformer"; }, 60'039'680},
                                         Count{"transformer_kvc",
                                               [](ModelConfig& c) {
                                                 c.kind = "transformer";
                                                 c.attn_dim = 128;
                                               },
                                               53'748'224},
                                         Count{"mamba_groups_16",
                                               [](ModelConfig& c) {
                                                 c.kind = "mamba";
                                                 c.ssm = paper_ssm(1024, 128, 16, 16);
                                               },
                                               62'370'560},
                                         Count{"mamba_groups_2",
                                               [](ModelConfig& c) {
                                                 c.kind = "mamba";
                                                 c.ssm = paper_ssm(1024, 1024, 8, 2);
                                               },
                                               62'337'664},
                                         Count{"mingru",
                                               [](ModelConfig& c) {
                                                 c.kind = "mingru";
                                                 c.dim = 576;
                                                 c.hidden = 1280;
                                               },
                                               60'503'104},
                                         Count{"hawk",
                                               [](ModelConfig& c) {
                                                 c.kind = "hawk";
                                                 c.dim = 480;
                                                 c.hidden = 768;
                                                 c.ffn_dim = 1280;
                                               },
                                               63'783'648}),
                         name_of_case);

TEST(ParameterCount, FollowsTheOptionalParameters) {
  ModelConfig config;
  const std::int64_t before = parameter_count(config);
  config.ssm.dt_bias = true;
  EXPECT_EQ(parameter_count(config) - before, 8 * 2 * 8);  // layers, SSMs, heads
  config.ssm.dt_bias = false;
  config.ssm.conv = 0;
  EXPECT_EQ(before - parameter_count(config), 8 * 2 * (256 + 2 * 32) * 4);
  config.ssm.conv = 4;
  config.tie_embeddings = true;
  EXPECT_EQ(before - parameter_count(config), 32000 * 512);
}

TEST(ParameterCount, WithKeyProjectionsSsmsAreAsWideAsTheKeys) {
  ModelConfig config;
  config.n_layers = 1;
  config.kv_proj = true;
  const std::int64_t before = parameter_count(config);
  config.n_kv_heads = 2;  // keys 128 wide instead of 512
  const std::int64_t projections = 2 * (512 - 128) * 512;
  const std::int64_t ssms = 2 * ((2 * 256 + 2 * 32 + 8) + 256) * (512 - 128);
  EXPECT_EQ(before - parameter_count(config), projections + ssms);
}

// ---------------------------------------------------------------------------------------------- derived widths

TEST(ModelConfig, DerivesWhatIsZero) {
  ModelConfig config;
  EXPECT_EQ(config.kv_heads(), 8);
  EXPECT_EQ(config.head_width(), 64);
  EXPECT_EQ(config.attention_width(), 512);
  EXPECT_EQ(config.kv_width(), 512);
  config.n_kv_heads = 4;
  config.head_dim = 128;
  EXPECT_EQ(config.attention_width(), 1024);
  EXPECT_EQ(config.kv_width(), 512);
  EXPECT_NO_THROW(validate(config));
}

TEST(ModelConfig, TransformerHeadsComeFromItsAttentionWidth) {
  ModelConfig config;
  config.kind = "transformer";
  config.head_dim = 64;  // as in the golden files: the transformer's own width counts
  EXPECT_EQ(config.attention_width(), 512);
  config.attn_dim = 128;
  EXPECT_EQ(config.attention_width(), 128);
  EXPECT_EQ(config.head_width(), 16);
  EXPECT_EQ(config.kv_width(), 128);
  EXPECT_NO_THROW(validate(config));
}

TEST(ModelConfig, ChunksMayBeLongerThanTheSequence) {
  ModelConfig config;
  config.chunking.size = 64;
  config.chunking.leading_tokens = 5;
  EXPECT_NO_THROW(validate(config, 40));
}

// ---------------------------------------------------------------------------------------------- impossible shapes

struct Impossible {
  const char* name;
  std::function<void(ModelConfig&)> change;
  const char* key_and_value;
  const char* advice;
};

class ImpossibleModel : public testing::TestWithParam<Impossible> {};

TEST_P(ImpossibleModel, IsRefusedWithKeyValueAndAdvice) {
  ModelConfig config;
  GetParam().change(config);
  try {
    validate(config);
    FAIL() << "an impossible model passed";
  } catch (const UsageError& error) {
    const std::string message = error.what();
    EXPECT_THAT(message, AllOf(HasSubstr(GetParam().key_and_value), HasSubstr(GetParam().advice)));
    EXPECT_EQ(message.find('\n'), std::string::npos);
  }
}

void make_transformer(ModelConfig& c, std::int64_t attn_dim) {
  c.kind = "transformer";
  c.attn_dim = attn_dim;
}

void make_recurrent(ModelConfig& c, const char* kind, std::int64_t hidden) {
  c.kind = kind;
  c.hidden = hidden;
}

using C = ModelConfig;

INSTANTIATE_TEST_SUITE_P(
    Names, ImpossibleModel,
    testing::Values(
        Impossible{"kind", [](C& c) { c.kind = "atamba"; }, "model.kind = \"atamba\"", "did you mean \"attamba\"?"},
        Impossible{"kind_far", [](C& c) { c.kind = "x"; }, "model.kind = \"x\"", "Known: attamba, transformer, mamba"},
        Impossible{"strategy", [](C& c) { c.chunking.strategy = "cycle"; }, "model.chunking.strategy = \"cycle\"",
                   "\"cyclic\"?"},
        Impossible{"attention_chosen", [](C& c) { c.chunking.strategy = "fattn"; }, "model.chunking.strategy = fattn",
                   "not implemented"},
        Impossible{"ends_of_nobody", [](C& c) { c.chunking.ends_file = "ends.txt"; }, "model.chunking.ends_file = ends.txt",
                   "\"cyclic\""},
        Impossible{"semantics", [](C& c) { c.semantics = "papre"; }, "model.semantics = \"papre\"", "did you mean \"paper\"?"},
        Impossible{"released_of_another_kind", [](C& c) { c.semantics = "released", c.kind = "mamba"; },
                   "model.semantics = \"released\"", "use \"paper\""},
        Impossible{"released_random", [](C& c) { c.semantics = "released", c.chunking.strategy = "random"; },
                   "model.semantics = \"released\"", "\"cyclic\""},
        Impossible{"released_documents", [](C& c) { c.semantics = "released", c.document_mask = true; },
                   "model.document_mask = true", "use model.semantics = \"paper\""}),
    name_of_case);

INSTANTIATE_TEST_SUITE_P(
    Extents, ImpossibleModel,
    testing::Values(Impossible{"vocab", [](C& c) { c.vocab_size = 0; }, "model.vocab_size = 0", "at least 2"},
                    Impossible{"large_vocab", [](C& c) { c.vocab_size = std::int64_t{1} << 31; },
                               "model.vocab_size = 2147483648", "at most"},
                    Impossible{"dim", [](C& c) { c.dim = 0; }, "model.dim = 0", "at least 1"},
                    Impossible{"large_dim", [](C& c) { c.dim = 1 << 21; }, "model.dim = 2097152", "at most 1048576"},
                    Impossible{"layers", [](C& c) { c.n_layers = 0; }, "model.n_layers = 0", "at least 1"},
                    Impossible{"heads", [](C& c) { c.n_heads = -8; }, "model.n_heads = -8", "at least 1"},
                    Impossible{"kv_heads", [](C& c) { c.n_kv_heads = -1; }, "model.n_kv_heads = -1", "at least 0"},
                    Impossible{"ffn", [](C& c) { c.ffn_dim = 0; }, "model.ffn_dim = 0", "at least 1"},
                    Impossible{"eps", [](C& c) { c.norm_eps = 0; }, "model.norm_eps = 0", "positive"},
                    Impossible{"eps_nan", [](C& c) { c.norm_eps = std::numeric_limits<double>::quiet_NaN(); },
                               "model.norm_eps = nan", "1e-5"},
                    Impossible{"theta", [](C& c) { c.rope_theta = 1; }, "model.rope_theta = 1", "10000"},
                    Impossible{"chunk_size", [](C& c) { c.chunking.size = 0; }, "model.chunking.size = 0", "use 1"},
                    Impossible{"leading", [](C& c) { c.chunking.leading_tokens = -1; }, "model.chunking.leading_tokens = -1",
                               "use 0"},
                    Impossible{"ssm_hidden", [](C& c) { c.ssm.hidden = 0; }, "model.ssm.hidden = 0", "at least 1"},
                    Impossible{"ssm_state", [](C& c) { c.ssm.state = 0; }, "model.ssm.state = 0", "at least 1"},
                    Impossible{"ssm_conv", [](C& c) { c.ssm.conv = -1; }, "model.ssm.conv = -1", "at least 0"}),
    name_of_case);

INSTANTIATE_TEST_SUITE_P(
    Divisibility, ImpossibleModel,
    testing::Values(
        Impossible{"heads_of_dim", [](C& c) { c.dim = 500; }, "model.dim = 500", "try 496 or 504"},
        Impossible{"kv_heads_of_heads", [](C& c) { c.n_kv_heads = 3; }, "model.n_kv_heads = 3", "divide model.n_heads = 8"},
        Impossible{"kv_width", [](C& c) { c.n_kv_heads = 4; }, "model.n_kv_heads = 4", "set model.kv_proj = true"},
        Impossible{"odd_head", [](C& c) { c.kv_proj = true, c.head_dim = 63; }, "model.head_dim = 63", "even"},
        Impossible{"odd_head_derived", [](C& c) { c.dim = 72; }, "model.head_dim = 9", "even"},
        Impossible{"ssm_heads", [](C& c) { c.ssm.heads = 3; }, "model.ssm.hidden = 256", "try 255 or 258"},
        Impossible{"ssm_groups", [](C& c) { c.ssm.groups = 3; }, "model.ssm.groups = 3", "divide model.ssm.heads = 8"},
        Impossible{"attn_dim", [](C& c) { make_transformer(c, 100); }, "model.attn_dim = 100", "try 96 or 104"},
        Impossible{"attn_dim_odd", [](C& c) { make_transformer(c, 72); }, "model.attn_dim = 72", "try 64 or 80"},
        Impossible{"transformer_kv_heads", [](C& c) { make_transformer(c, 0), c.n_kv_heads = 2; }, "model.n_kv_heads = 2",
                   "model.attn_dim"},
        Impossible{"sliding_window", [](C& c) { make_transformer(c, 0), c.sliding_window = -1; }, "model.sliding_window = -1",
                   "use 0"},
        Impossible{"mingru_hidden", [](C& c) { make_recurrent(c, "mingru", 0); }, "model.hidden = 0", "1280"},
        Impossible{"mingru_conv",
                   [](C& c) {
                     make_recurrent(c, "mingru", 8);
                     c.conv = 9;
                   },
                   "model.conv = 9", "the paper uses 4"},
        Impossible{"hawk_hidden", [](C& c) { make_recurrent(c, "hawk", 0); }, "model.hidden = 0", "768"},
        Impossible{"hawk_heads", [](C& c) { make_recurrent(c, "hawk", 700); }, "model.hidden = 700", "try 696 or 704"}),
    name_of_case);

TEST(ImpossibleModel, MoreLeadingTokensThanTheSequenceHolds) {
  ModelConfig config;
  EXPECT_NO_THROW(validate(config, 16));
  try {
    validate(config, 15);
    FAIL() << "16 leading tokens passed for sequences of 15";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("model.chunking.leading_tokens = 16"), HasSubstr("use at most 15")));
  }
}

TEST(ImpossibleModel, EmptySequences) {
  EXPECT_THROW(validate(ModelConfig(), 0), UsageError);
}

TEST(ImpossibleModel, ExplicitChunksNeedAFileAndWholeSequences) {
  const auto message = [](const ModelConfig& config) -> std::string {
    try {
      validate(config, 16);
      return "accepted";
    } catch (const UsageError& error) {
      return error.what();
    }
  };
  ModelConfig config;
  config.chunking.strategy = "explicit";
  EXPECT_THAT(message(config), HasSubstr("model.chunking.ends_file"));
  config.chunking.ends_file = "ends.txt";
  EXPECT_EQ(message(config), "accepted");
  config.document_mask = true;
  EXPECT_THAT(message(config), AllOf(HasSubstr("model.document_mask = true"), HasSubstr("explicit")));
}

TEST(ImpossibleModel, KeysOfOtherKindsDoNotCount) {
  ModelConfig config;
  config.kind = "transformer";
  config.chunking.size = 0;
  config.ssm.heads = 7;  // divides nothing
  config.hidden = 0;
  EXPECT_NO_THROW(validate(config, 8));
}

}  // namespace
}  // namespace attamba
