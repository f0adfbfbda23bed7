// Building a stage and running its steps: the C interface that library.py loads.
#include "stage.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "memory.h"
#include "threads.h"

namespace fastserve {
namespace {

enum InstructionSet : int32_t { PORTABLE, AVX2, AVX512, AVX512_BF16 };

int best_instruction_set() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return AVX512_BF16;
  return avx512 ? AVX512 : avx2 ? AVX2 : PORTABLE;
#else
  return PORTABLE;
#endif
}

Kernels choose_kernels(int instruction_set, DType dtype) {
#if defined(__x86_64__)
  if (instruction_set == AVX512_BF16)
    return dtype == BFLOAT16 ? avx512_bf16_kernels() : avx512_kernels(dtype);
  if (instruction_set == AVX512) return avx512_kernels(dtype);
  if (instruction_set == AVX2) return avx2_kernels(dtype);
#endif
  return portable_kernels(dtype);
}

size_t element_bytes(const StageConfig& config) { return config.dtype == BFLOAT16 ? 2 : 4; }

}  // namespace

// A stage with all that belongs to it.
struct OwnedStage {
  explicit OwnedStage(const StageConfig& config)
      : kernels(choose_kernels(config.instruction_set, static_cast<DType>(config.dtype))),
        layers(config.layers + 1),
        ropes(config.ropes),
        weights(config.weight_bytes),
        team(config.threads),
        own_rows(config.threads),
        own_bytes(config.threads),
        scores(config.threads) {
    stage.config = config;
    stage.layers = layers.data();
    stage.ropes = ropes.data();
    stage.team = &team;
    stage.own_rows = own_rows.data();
    stage.own_bytes = own_bytes.data();
    stage.scores = scores.data();
    Workspace& work = stage.work;
    const int heads = config.kv_heads * config.group;
    link_matrices();
    work.hidden_width = round_up(config.hidden, PANEL);
    work.ffn_width = round_up(config.feed_forward, PANEL);
    work.qkv_width = round_up((heads + 2 * config.kv_heads) * config.head_dim, PANEL);
    work.heads_width = round_up(heads * config.head_dim, PANEL);
  }

  void link_matrices();
  void make_room(int rows, int context);
  void plan_attention(const StepInput& step);

  Stage stage;
  Kernels kernels;
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  Memory weights, rows, score_memory;
  Team team;
  std::vector<char*> own_rows, own_bytes, scores;
  std::vector<AttentionItem> items;
};

// In the order of reading; a step's last matrix is followed by the first of the next step.
void OwnedStage::link_matrices() {
  Matrix* before = &layers.back().matrices[OUTPUT];
  for (Layer& layer : layers) {
    const int count = &layer != &layers.back() ? MATRICES : stage.config.last ? OUTPUT + 1 : 0;
    for (int name = 0; name < count; name++) {
      before->next = &layer.matrices[name];
      before = &layer.matrices[name];
    }
  }
  before->next = &layers.front().matrices[QKV];
}

void OwnedStage::make_room(int needed_rows, int context) {
  const StageConfig& config = stage.config;
  Workspace& work = stage.work;
  const size_t element = element_bytes(config), threads = config.threads;
  if (needed_rows > work.capacity) {
    const size_t count = std::max(2 * work.capacity, round_up(needed_rows, 64));
    const size_t hidden = count * work.hidden_width, heads = count * work.heads_width;
    const size_t qkv = count * work.qkv_width, ffn = count * work.ffn_width;
    const size_t angles = count * config.ropes * (config.head_dim / 2);
    const size_t own = threads * OWN_ROWS * work.hidden_width * element;
    const size_t gathered = config.ranks > 1 ? config.ranks * hidden : 0;
    const int widest = std::max({work.hidden_width, work.heads_width, work.ffn_width});
    const size_t byte_row = config.has_byte_weights ? byte_row_bytes(widest) : 0;
    const size_t bytes = byte_row * (count + threads * OWN_ROWS);
    const size_t floats = sizeof(float) * (2 * hidden + gathered + qkv + 2 * angles);
    rows = Memory(floats + element * (hidden + 2 * heads + ffn) + own + bytes +
                  (16 + 2 * threads) * 64);
    work.capacity = static_cast<int>(count);
    work.hidden = rows.take<float>(hidden);
    work.added = rows.take<float>(hidden);
    work.gathered = rows.take<float>(gathered);
    work.qkv = rows.take<float>(qkv);
    work.cosines = rows.take<float>(angles);
    work.sines = rows.take<float>(angles);
    work.normed = rows.take<char>(hidden * element);
    work.query = rows.take<char>(heads * element);
    work.attended = rows.take<char>(heads * element);
    work.activated = rows.take<char>(ffn * element);
    work.byte_row = byte_row;
    work.bytes = rows.take<char>(byte_row * count);
    for (char*& own_row : own_rows) own_row = rows.take<char>(own / threads);
    for (char*& own_row : own_bytes) own_row = rows.take<char>(byte_row * OWN_ROWS);
  }
  // A row's scores end with the vector that reads over the end of its last block.
  const int width = round_up(context, config.block_size) + 64;
  if (width > stage.score_width) {
    stage.score_width = round_up(std::max(width, 2 * stage.score_width), 16);
    const size_t bytes = sizeof(float) * kernels.attention_rows * stage.score_width;
    score_memory = Memory(threads * (bytes + 64));
    for (char*& score : scores) score = score_memory.take<char>(bytes);
  }
}

void OwnedStage::plan_attention(const StepInput& step) {
  items.clear();
  for (int sequence = 0; sequence < step.sequences; sequence++) {
    const int total = step.rows[sequence] * stage.config.group;
    for (int kv_head = 0; kv_head < stage.config.kv_heads; kv_head++)
      for (int first = 0; first < total; first += kernels.attention_rows)
        items.push_back({sequence, kv_head, first, std::min(kernels.attention_rows, total - first)});
  }
  stage.items = items.data();
  stage.item_count = static_cast<int>(items.size());
}

namespace {

// Panel p of the matrix is rows [32 p, 32 p + 32) of `from`, or every `step`-th panel from `first`.
void pack_panels(Unit* to, const Unit* from, int rows, int units, int first, int step) {
  for (int panel = 0; panel * PANEL < rows; panel++) {
    Unit* target = to + static_cast<size_t>(panel * step + first) * units * PANEL;
    for (int row = 0; row < PANEL && panel * PANEL + row < rows; row++) {
      const Unit* source = from + static_cast<size_t>(panel * PANEL + row) * units;
      for (int u = 0; u < units; u++) target[static_cast<size_t>(u) * PANEL + row] = source[u];
    }
  }
}

bool is_interleaved(const StageConfig& config, int layer, int matrix) {
  return config.gated && matrix == FC1 && layer < config.layers;
}

}  // namespace
}  // namespace fastserve

using namespace fastserve;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int fastserve_best_instruction_set() { return best_instruction_set(); }

// Its size tells a library that was built from other sources than those of the Python side.
EXPORT int32_t fastserve_config_bytes() { return sizeof(StageConfig); }

// Null when there is not enough memory or no thread to be had.
EXPORT OwnedStage* fastserve_create(const StageConfig* config) {
  try {
    return new OwnedStage(*config);
  } catch (const std::exception&) {
    return nullptr;
  }
}

EXPORT void fastserve_destroy(OwnedStage* owned) { delete owned; }

// Lay out a matrix [rows][columns]; layer `layers` is the output. 0, or -1 without memory.
EXPORT int fastserve_set_matrix(OwnedStage* owned, int layer, int name, const void* from, int rows,
                                int columns) {
  const StageConfig& config = owned->stage.config;
  const int units = columns * static_cast<int>(element_bytes(config)) / 4;
  const int parts = is_interleaved(config, layer, name) ? 2 : 1, part_rows = rows / parts;
  Matrix& matrix = owned->layers[layer].matrices[name];
  matrix.group = parts;
  matrix.panel_count = round_up(part_rows, PANEL) / PANEL * parts;
  matrix.inputs = columns;
  matrix.units = units;
  matrix.byte_groups = config.has_byte_weights ? groups_of(columns) : 0;
  matrix.panel_bytes = matrix.byte_groups
                           ? static_cast<size_t>(matrix.byte_groups) * BYTE_GROUP_BYTES
                           : sizeof(Unit) * units * PANEL;
  try {
    char* to = owned->weights.take<char>(matrix.panel_count * matrix.panel_bytes);
    const char* source = static_cast<const char*>(from);
    for (int part = 0; part < parts; part++, source += sizeof(Unit) * part_rows * units) {
      if (matrix.byte_groups)
        owned->kernels.pack_bytes(to, source, part_rows, columns, part, parts);
      else
        pack_panels(reinterpret_cast<Unit*>(to), reinterpret_cast<const Unit*>(source), part_rows,
                    units, part, parts);
    }
    matrix.panels = to;
  } catch (const std::bad_alloc&) {
    return -1;
  }
  return 0;
}

// Copy a vector; the bias of a gated matrix is laid out like it.
EXPORT int fastserve_set_vector(OwnedStage* owned, int layer, int name, const float* from, int size) {
  const StageConfig& config = owned->stage.config;
  const int parts = is_interleaved(config, layer, name - BIASES) ? 2 : 1;
  const int count = size / parts;
  try {
    float* to = owned->weights.take<float>(round_up(count, PANEL) * parts);
    for (int part = 0; part < parts; part++)
      for (int i = 0; i < count; i++)
        to[(i / PANEL * parts + part) * PANEL + i % PANEL] = from[part * count + i];
    owned->layers[layer].vectors[name] = to;
  } catch (const std::bad_alloc&) {
    return -1;
  }
  return 0;
}

// Number of the rotation, -1 for none; tokens that a token sees, 0 for all.
EXPORT void fastserve_set_attention(OwnedStage* owned, int layer, int rope, int window) {
  owned->layers[layer].rope = rope;
  owned->layers[layer].window = window;
}

// `frequencies` [pairs] must stay where they are, like the tables below.
EXPORT void fastserve_set_rope(OwnedStage* owned, int number, const float* frequencies, int pairs,
                               float factor) {
  owned->ropes[number] = Rope{frequencies, pairs, factor};
}

// Rows of token and position embeddings; null for the output matrix and for none.
EXPORT void fastserve_set_tables(OwnedStage* owned, const void* tokens, const void* positions) {
  owned->stage.embedding = tokens;
  owned->stage.position_table = positions;
}

// 0; -1 without memory; -2 when what other ranks have could not be gathered; 1 when it was abandoned.
EXPORT int fastserve_step(OwnedStage* owned, const StepInput* step) {
  try {
    owned->make_room(step->tokens, step->max_context);
    owned->plan_attention(*step);
  } catch (const std::bad_alloc&) {
    return -1;
  }
  owned->stage.step = *step;
  owned->stage.verdict = step->ask ? UNKNOWN : GO_ON;
  owned->team.run(
      [](void* argument, int thread) {
        auto* self = static_cast<OwnedStage*>(argument);
        self->kernels.run(self->stage, thread);
      },
      owned);
  if (owned->stage.verdict == ABANDON) return 1;
  return owned->stage.has_lost_rank ? -2 : 0;
}

EXPORT void fastserve_find_largest(const float* logits, int rows, int columns, int32_t* tokens,
                                   float* values) {
  static const Kernels kernels = choose_kernels(best_instruction_set(), FLOAT32);
  kernels.find_largest(logits, rows, columns, tokens, values);
}
