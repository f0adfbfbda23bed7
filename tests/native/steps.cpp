// Steps of small random models through the C interface, for the sanitizers: all instruction sets
// that this machine has, both precisions, 8-bit weights, odd sizes. The logits of a prompt must be the same bits
// alone and in chunks beside another one.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "stage.h"

using namespace fastserve;

struct OwnedStage;
extern "C" {
int fastserve_best_instruction_set();
OwnedStage* fastserve_create(const StageConfig*);
void fastserve_destroy(OwnedStage*);
int fastserve_set_matrix(OwnedStage*, int layer, int name, const void*, int rows, int columns);
int fastserve_set_vector(OwnedStage*, int layer, int name, const float*, int size);
void fastserve_set_attention(OwnedStage*, int layer, int rope, int window);
void fastserve_set_rope(OwnedStage*, int number, const float*, float factor);
void fastserve_set_tables(OwnedStage*, const void* tokens, const void* positions);
int fastserve_step(OwnedStage*, const StepInput*);
void fastserve_find_largest(const float*, int rows, int columns, int32_t* tokens, float* values);
}

namespace {

constexpr int LAYERS = 2, HIDDEN = 36, FEED_FORWARD = 50, VOCABULARY = 131, BLOCKS = 80;
std::mt19937 generator(1);

void check(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "failed: %s\n", what);
  exit(1);
}

std::vector<float> floats(size_t count) {
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// Random numbers of a precision; the upper half of a float is its bfloat16.
std::vector<char> numbers(size_t count, int dtype) {
  const std::vector<float> values = floats(count);
  std::vector<char> bytes(count * (dtype == BFLOAT16 ? 2 : 4));
  for (size_t i = 0; i < count; i++) {
    const char* value = reinterpret_cast<const char*>(&values[i]);
    if (dtype == BFLOAT16)
      memcpy(&bytes[2 * i], value + 2, 2);
    else
      memcpy(&bytes[4 * i], value, 4);
  }
  return bytes;
}

// As if another rank had nothing to add.
int gather_from_nobody(const float* own, float* all, int64_t count) {
  memcpy(all, own, sizeof(float) * count);
  memset(all + count, 0, sizeof(float) * count);
  return 0;
}

struct Model {
  StageConfig config{};
  std::vector<char> pool, embedding;
  std::vector<float> frequencies;
  OwnedStage* stage;

  Model(int instruction_set, int dtype, bool byte_weights, int head_dim, int group, bool gated,
        int norm) {
    config.instruction_set = instruction_set;
    config.threads = 3;
    config.dtype = dtype;
    config.has_byte_weights = byte_weights;
    config.layers = LAYERS;
    config.hidden = HIDDEN;
    config.feed_forward = FEED_FORWARD;
    config.kv_heads = 2;
    config.group = group;
    config.head_dim = head_dim;
    config.block_size = group == 1 ? 6 : 4;
    config.vocabulary = VOCABULARY;
    config.norm = norm;
    config.activation = gated ? SILU : GELU;
    config.gated = gated;
    config.ropes = 1;
    config.first = config.last = 1;
    config.ranks = gated ? 2 : 1;
    config.gather = gather_from_nobody;
    config.norm_epsilon = 1e-5f;
    config.attention_scale = 0.3f;
    config.attention_softcap = gated ? 0.0f : 2.0f;
    config.embedding_scale = 1.0f;
    config.weight_bytes = 4 << 20;
    pool.resize(sizeof(float) * BLOCKS * LAYERS * 2 * 2 * config.block_size * head_dim);
    config.pool = pool.data();
    stage = fastserve_create(&config);
    check(stage, "create");
    frequencies = floats(head_dim / 2);
    fastserve_set_rope(stage, 0, frequencies.data(), 1.0f);
    for (int layer = 0; layer < LAYERS; layer++) set_layer(layer);
    set_matrix(LAYERS, OUTPUT, VOCABULARY, HIDDEN);
    set_norm(LAYERS, FINAL_NORM, HIDDEN);
    embedding = numbers(VOCABULARY * HIDDEN, dtype);
    fastserve_set_tables(stage, gated ? nullptr : embedding.data(), nullptr);
  }
  ~Model() { fastserve_destroy(stage); }

  void set_matrix(int layer, int name, int rows, int columns) {
    const auto values = numbers(static_cast<size_t>(rows) * columns, config.dtype);
    check(!fastserve_set_matrix(stage, layer, name, values.data(), rows, columns), "matrix");
    if (layer < LAYERS)
      check(!fastserve_set_vector(stage, layer, BIASES + name, floats(rows).data(), rows), "bias");
  }

  void set_norm(int layer, int name, int size) {
    check(!fastserve_set_vector(stage, layer, name, floats(size).data(), size), "norm");
    if (config.norm == LAYER_NORM)
      check(!fastserve_set_vector(stage, layer, name + 1, floats(size).data(), size), "norm bias");
  }

  void set_layer(int layer) {
    const int heads = config.kv_heads * config.group, dims = config.head_dim;
    set_matrix(layer, QKV, (heads + 2 * config.kv_heads) * dims, HIDDEN);
    set_matrix(layer, PROJECTION, HIDDEN, heads * dims);
    set_matrix(layer, FC1, FEED_FORWARD * (config.gated ? 2 : 1), HIDDEN);
    set_matrix(layer, FC2, HIDDEN, FEED_FORWARD);
    for (int name : {INPUT_NORM, FEED_FORWARD_NORM}) set_norm(layer, name, HIDDEN);
    if (layer) set_norm(layer, POST_ATTENTION_NORM, HIDDEN);
    if (config.gated) set_norm(layer, QUERY_NORM, dims), set_norm(layer, KEY_NORM, dims);
    fastserve_set_attention(stage, layer, layer ? 0 : -1, layer ? 9 : 0);
  }

  // Logits behind the last of `count` tokens of prompt 0 from `start` on, in blocks 1, 2, …;
  // beside them, if wanted, a token of a prompt in other blocks. None if `ask` says so.
  std::vector<float> run(int start, int count, bool beside, int32_t (*ask)() = nullptr) {
    const int size = config.block_size;
    std::vector<int32_t> tokens, positions, slots, tables;
    for (int p = start; p < start + count; p++) tokens.push_back(p * 7 % VOCABULARY);
    for (int p = start; p < start + count; p++) positions.push_back(p), slots.push_back(size + p);
    for (int block = 1; block <= (start + count + size - 1) / size; block++) tables.push_back(block);
    const int32_t first_row[] = {0, count}, rows[] = {count, 1}, starts[] = {start, 0};
    const int32_t table_at[] = {0, static_cast<int32_t>(tables.size())};
    const int32_t sample_rows[] = {count - 1, count};
    tokens.push_back(5), positions.push_back(0), slots.push_back(78 * size), tables.push_back(78);
    std::vector<float> logits(VOCABULARY * (1 + beside));
    const StepInput step{count + beside, 1 + beside, 1 + beside, start + count, tokens.data(),
                         positions.data(), slots.data(), first_row, rows, starts, table_at,
                         tables.data(), sample_rows, nullptr, nullptr, logits.data(),
                         nullptr, ask};
    const int status = fastserve_step(stage, &step);
    check(!status || (ask && status == 1), "step");
    logits.resize(status ? 0 : VOCABULARY);
    return logits;
  }
};

int asked;

}  // namespace

int main() {
  int models = 0;
  for (int set = 0; set <= fastserve_best_instruction_set(); set++)
    for (int kind : {0, 1, 2, 3})
      for (int head_dim : {8, 20, 64})
        for (int group : {1, 3}) {
          Model model(set, kind % 2, kind / 2, head_dim, group, group == 3,
                      group == 3 ? RMS_NORM : LAYER_NORM);
          // Long enough for the threads to go through the layers apart.
          const auto whole = model.run(0, 242, false);
          for (float value : whole) check(value - value == 0.0f, "finite logits");
          int32_t token;
          float largest;
          fastserve_find_largest(whole.data(), 1, VOCABULARY, &token, &largest);
          for (float value : whole) check(value <= largest, "the largest logit");
          check(whole[token] == largest, "where it is");
          model.run(0, 30, true);
          model.run(30, 211, false);
          asked = 0;
          check(model.run(241, 1, true, [] { return int32_t{asked++ ? ABANDON : UNKNOWN}; }).empty(),
                "abandoned in the second layer");
          check(asked == 2, "asked no more");
          check(!memcmp(model.run(241, 1, true).data(), whole.data(), whole.size() * sizeof(float)),
                "the same bits in chunks");
          models++;
        }
  printf("%d models: the same bits alone and in chunks\n", models);
}
