// What a step begins with: rows of the residual, and angles; included once per instruction set.

// Sum what is added over the ranks that share the layers, in their order: a row's sum does not
// depend on its step. Afterwards each thread has its share of the rows.
static void sum_over_ranks(Stage& stage, int thread, int rows) {
  const Workspace& work = stage.work;
  const size_t all = static_cast<size_t>(rows) * work.hidden_width;
  wait_for_team(stage);
  if (thread == 0) gather_rows(stage, rows);
  wait_for_team(stage);
  int from, to;
  share(stage, thread, rows, from, to);
  for (size_t i = static_cast<size_t>(from) * work.hidden_width;
       i < static_cast<size_t>(to) * work.hidden_width; i += LANES) {
    Vec sum = load(work.gathered + i);
    for (int rank = 1; rank < stage.config.ranks; rank++) sum += load(work.gathered + rank * all + i);
    store(work.added + i, sum);
  }
}

// A token's row of the embedding table, zeros where another rank has it. Where the table is the
// output matrix, it is only there packed.
template <class T>
static void embed_row(const Stage& stage, int token, float* out) {
  const StageConfig& c = stage.config;
  const int size = c.hidden, row = token - c.first_token;
  if (c.ranks > 1 && (row < 0 || row >= c.vocabulary)) {
    memset(out, 0, sizeof(float) * size);
  } else if (stage.embedding) {
    const T* table = static_cast<const T*>(stage.embedding) + static_cast<size_t>(row) * size;
    for (int k = 0; k < size; k++) out[k] = to_float(table[k]);
  } else {
    const Matrix& matrix = stage.layers[c.layers].matrices[OUTPUT];
    if (matrix.byte_groups) return unpack_bytes(matrix, row, out);
    const Unit* at = matrix.units_at(row / PANEL) + row % PANEL;
    for (int u = 0; u < matrix.units; u++) {
      T values[per_unit<T>()];
      memcpy(values, at + static_cast<size_t>(u) * PANEL, sizeof(Unit));
      for (int i = 0; i < per_unit<T>(); i++) out[u * per_unit<T>() + i] = to_float(values[i]);
    }
  }
}

// The residual of a thread's share of the tokens, from the tables.
template <class T>
static void embed_rows(Stage& stage, int thread, int from, int to) {
  const StageConfig& c = stage.config;
  const int width = stage.work.hidden_width;
  float* found = c.ranks > 1 ? stage.work.added : stage.work.hidden;
  for (int row = from; row < to; row++)
    embed_row<T>(stage, stage.step.token_ids[row], rows_of<float>(found, row, width));
  if (c.ranks > 1) sum_over_ranks(stage, thread, stage.step.tokens);
  for (int row = from; row < to; row++) {
    float* hidden = rows_of<float>(stage.work.hidden, row, width);
    if (c.ranks > 1) memcpy(hidden, rows_of<float>(found, row, width), sizeof(float) * c.hidden);
    if (stage.position_table) {
      const T* table = static_cast<const T*>(stage.position_table) +
                       static_cast<size_t>(stage.step.positions[row]) * c.hidden;
      for (int k = 0; k < c.hidden; k++) hidden[k] += to_float(table[k]);
    }
    if (c.embedding_scale != 1.0f)
      for (int k = 0; k < c.hidden; k++) hidden[k] *= c.embedding_scale;
  }
}

template <class T>
static void enter(Stage& stage, int thread) {
  const StageConfig& c = stage.config;
  const int half = c.head_dim / 2;
  int from, to;
  share(stage, thread, stage.step.tokens, from, to);
  if (c.first) embed_rows<T>(stage, thread, from, to);
  for (int row = from; row < to; row++) {
    if (!c.first)
      memcpy(rows_of<float>(stage.work.hidden, row, stage.work.hidden_width),
             stage.step.hidden_in + static_cast<size_t>(row) * c.hidden, sizeof(float) * c.hidden);
    for (int n = 0; n < c.ropes; n++) {
      const Rope& rope = stage.ropes[n];
      const size_t at = (static_cast<size_t>(n) * stage.work.capacity + row) * half;
      for (int i = 0; i < rope.pairs; i++) {
        const float angle = static_cast<float>(stage.step.positions[row]) * rope.frequencies[i];
        stage.work.cosines[at + i] = cosf(angle) * rope.factor;
        stage.work.sines[at + i] = sinf(angle) * rope.factor;
      }
    }
  }
  wait_for_team(stage);
}
