// A whole step of a stage on one of its threads; included once per instruction set.

// Rows that a thread takes through a layer by itself in a long step.
constexpr int ROWS_APART = 3 * MAX_ROWS;

// Norm rows of the residual, or those in `chosen`; without a norm they are copied. Returns where they are: in a small step each
// thread has its own, so that none has to wait.
template <class T>
static const T* norm_rows(Stage& stage, int thread, const float* const* norm, const Rows& rows,
                          const int32_t* chosen) {
  const int width = stage.work.hidden_width;
  const bool own = rows.shared && rows.count <= OWN_ROWS;
  void* target = own ? stage.own_rows[thread] : stage.work.normed;
  int from = 0, to = rows.count;
  if (rows.shared && !own) share(stage, thread, rows.count, from, to);
  for (int i = rows.first + from; i < rows.first + to; i++) {
    const float* hidden = stage.work.hidden + static_cast<size_t>(chosen ? chosen[i] : i) * width;
    T* out = rows_of<T>(target, i, width);
    if (norm[0])
      normalize<T>(stage.config, hidden, norm, stage.config.hidden, out);
    else
      copy_row(out, hidden, stage.config.hidden);
  }
  if (!own) wait_for_others(stage, rows);
  return rows_of<T>(target, rows.first, width);
}

static void add_rows(float* rows, int width, int panel, int first, int count, const float* added,
                     float scale) {
  for (int r = 0; r < count; r++) {
    float* row = rows + static_cast<size_t>(first + r) * width + panel * PANEL;
    for (int c = 0; c < PANEL; c += LANES)
      store(row + c, fma(all(scale), load(added + r * PANEL + c), load(row + c)));
  }
}

static void put_rows(float* rows, int width, int panel, int first, int count, const float* values) {
  for (int r = 0; r < count; r++)
    memcpy(rows + static_cast<size_t>(first + r) * width + panel * PANEL, values + r * PANEL,
           sizeof(float) * PANEL);
}

// Add x times a matrix to the residual: at once, or after the sum over the ranks and the norm of
// what is added, where there are such.
template <class T>
static void add_product(Stage& stage, int thread, const Layer& layer, MatrixName name,
                        VectorName post_norm, void* x, int x_width, const Rows& rows) {
  const Workspace& work = stage.work;
  const float* const* norm = layer.vectors + post_norm;
  const float* bias = layer.vectors[BIASES + name];
  const bool divided = stage.config.ranks > 1, at_once = !divided && !norm[0];
  const float scale = stage.config.residual_scale;
  multiply_matrix<T>(stage, thread, layer.matrices[name], divided ? nullptr : bias,
                     rows_of<T>(x, rows.first, x_width), x_width, rows,
                     [&](int panel, int first, int count, const float* out) {
                       if (at_once)
                         add_rows(work.hidden, work.hidden_width, panel, first, count, out, scale);
                       else
                         put_rows(work.added, work.hidden_width, panel, first, count, out);
                     });
  if (divided)
    sum_over_ranks(stage, thread, rows.count);
  else
    wait_for_others(stage, rows);
  if (at_once) return;
  int from = 0, to = rows.count;
  if (rows.shared) share(stage, thread, rows.count, from, to);
  for (int row = rows.first + from; row < rows.first + to; row++) {
    float* added = rows_of<float>(work.added, row, work.hidden_width);
    float* hidden = rows_of<float>(work.hidden, row, work.hidden_width);
    for (int k = 0; divided && bias && k < stage.config.hidden; k++) added[k] += bias[k];
    if (norm[0]) normalize<float>(stage.config, added, norm, stage.config.hidden, added);
    for (int k = 0; k < stage.config.hidden; k++) hidden[k] += scale * added[k];
  }
  wait_for_others(stage, rows);
}

// Queries, keys and values of a layer, the latter in their blocks.
template <class T>
static void before_attention(Stage& stage, int thread, int number, const Rows& rows) {
  const Layer& layer = stage.layers[number];
  const Workspace& work = stage.work;
  const LayerBlocks blocks = blocks_of_layer<T>(stage, number);
  const T* normed = norm_rows<T>(stage, thread, layer.vectors + INPUT_NORM, rows, nullptr);
  multiply_matrix<T>(stage, thread, layer.matrices[QKV], layer.vectors[BIASES + QKV], normed,
                     work.hidden_width, rows,
                     [&](int panel, int first, int count, const float* out) {
                       put_rows(work.qkv, work.qkv_width, panel, first, count, out);
                     });
  wait_for_others(stage, rows);
  Part part{0, rows.count, true};
  while (!rows.shared || take_part(stage, rows.count, 1, part)) {
    for (int row = rows.first + part.from; row < rows.first + part.to; row++)
      place_token<T>(stage, layer, blocks, row);
    if (!rows.shared) return;
  }
}

template <class T>
static void run_attention(Stage& stage, int thread, int number) {
  const LayerBlocks blocks = blocks_of_layer<T>(stage, number);
  wait_for_team(stage);
  const int window = stage.layers[number].window;
  Part part;
  while (take_part(stage, stage.item_count, 1, part)) {
    const AttentionItem* item = stage.items + part.from;
    const Reading next = reading_of(stage, blocks, item[!part.is_last], window, nullptr);
    const Reading reading = reading_of(stage, blocks, *item, window, part.is_last ? nullptr : &next);
    attend_item<T>(stage, *item, reading, window, reinterpret_cast<float*>(stage.scores[thread]));
  }
  wait_for_team(stage);
}

// The rest of a layer.
template <class T>
static void after_attention(Stage& stage, int thread, int number, const Rows& rows) {
  const Layer& layer = stage.layers[number];
  const Workspace& work = stage.work;
  add_product<T>(stage, thread, layer, PROJECTION, POST_ATTENTION_NORM, work.attended,
                 work.heads_width, rows);
  const T* normed = norm_rows<T>(stage, thread, layer.vectors + FEED_FORWARD_NORM, rows, nullptr);
  alignas(64) float gates[MAX_ROWS * PANEL];
  multiply_matrix<T>(stage, thread, layer.matrices[FC1], layer.vectors[BIASES + FC1], normed,
                     work.hidden_width, rows,
                     [&](int panel, int first, int count, const float* out) {
                       activate_rows<T>(stage, panel, first, count, out, gates);
                     });
  wait_for_others(stage, rows);
  add_product<T>(stage, thread, layer, FC2, POST_FEED_FORWARD_NORM, work.activated, work.ffn_width,
                 rows);
}

// Whether some rows of a step end with their keys and values in the last layer: nobody reads what
// else would become of them.
static bool drops_rows(const Stage& stage) {
  return stage.config.last && stage.step.samples < stage.step.tokens;
}

// The rows that go on after the attention of the last layer; where some are dropped, these come to
// the front. Through other buffers, since they can be in any order.
template <class T>
static Rows rows_after_last_attention(Stage& stage, int thread) {
  const StepInput& step = stage.step;
  const Workspace& work = stage.work;
  if (!drops_rows(stage)) return Rows{0, step.tokens, true};
  const size_t hidden_bytes = sizeof(float) * work.hidden_width;
  const size_t attended_bytes = sizeof(T) * work.heads_width;
  int from, to;
  share(stage, thread, step.samples, from, to);
  for (int i = from; i < to; i++) {
    const int row = step.sample_rows[i];
    memcpy(rows_of<float>(work.added, i, work.hidden_width),
           rows_of<float>(work.hidden, row, work.hidden_width), hidden_bytes);
    memcpy(rows_of<T>(work.query, i, work.heads_width),
           rows_of<T>(work.attended, row, work.heads_width), attended_bytes);
  }
  wait_for_team(stage);
  memcpy(rows_of<float>(work.hidden, from, work.hidden_width),
         rows_of<float>(work.added, from, work.hidden_width), hidden_bytes * (to - from));
  memcpy(rows_of<T>(work.attended, from, work.heads_width),
         rows_of<T>(work.query, from, work.heads_width), attended_bytes * (to - from));
  wait_for_team(stage);
  return Rows{0, step.samples, true};
}

// All layers with the threads at the same rows: each reads its part of the weights once.
template <class T>
static void run_together(Stage& stage, int thread) {
  const Rows rows{0, stage.step.tokens, true};
  const int layers = stage.config.layers;
  for (int layer = 0; layer < layers; layer++) {
    // All threads meet within the next line, and again before the next layer asks.
    if (thread == 0 && stage.verdict == UNKNOWN) stage.verdict = stage.step.ask();
    before_attention<T>(stage, thread, layer, rows);
    if (stage.verdict == ABANDON) return;
    run_attention<T>(stage, thread, layer);
    after_attention<T>(stage, thread, layer,
                       layer + 1 < layers ? rows : rows_after_last_attention<T>(stage, thread));
  }
}

// All layers with each thread at rows of its own: they meet only before and after attention, which
// matters when they do not all have a core. The weights are read once for some rows.
template <class T>
static void run_apart(Stage& stage, int thread) {
  const int layers = stage.config.layers, tokens = stage.step.tokens;
  for (int layer = -1; layer < layers; layer++) {
    if (layer >= 0) run_attention<T>(stage, thread, layer);
    if (layer + 1 == layers && drops_rows(stage))
      return after_attention<T>(stage, thread, layer, rows_after_last_attention<T>(stage, thread));
    Part part;
    while (take_part(stage, tokens, ROWS_APART, part)) {
      const Rows rows{part.from, part.to - part.from, false};
      if (layer >= 0) after_attention<T>(stage, thread, layer, rows);
      if (layer + 1 < layers) before_attention<T>(stage, thread, layer + 1, rows);
    }
  }
  wait_for_team(stage);
}

template <class T>
static void leave(Stage& stage, int thread) {
  const StageConfig& c = stage.config;
  const StepInput& step = stage.step;
  const Layer& end = stage.layers[c.layers];
  if (!c.last) {
    int from, to;
    share(stage, thread, step.tokens, from, to);
    for (int row = from; row < to; row++)
      memcpy(step.hidden_out + static_cast<size_t>(row) * c.hidden,
             stage.work.hidden + static_cast<size_t>(row) * stage.work.hidden_width,
             sizeof(float) * c.hidden);
    return;
  }
  if (!step.samples) return;
  const int32_t* chosen = drops_rows(stage) ? nullptr : step.sample_rows;
  if (step.normed) {
    int from, to;
    share(stage, thread, step.samples, from, to);
    for (int row = from; row < to; row++)
      normalize<float>(c, rows_of<float>(stage.work.hidden, chosen ? chosen[row] : row, stage.work.hidden_width),
                       end.vectors + FINAL_NORM, c.hidden, step.normed + static_cast<size_t>(row) * c.hidden);
  }
  const Rows rows{0, step.samples, true};
  const T* normed = norm_rows<T>(stage, thread, end.vectors + FINAL_NORM, rows, chosen);
  multiply_matrix<T>(stage, thread, end.matrices[OUTPUT], nullptr, normed, stage.work.hidden_width,
                     rows,
                     [&](int panel, int first, int count, const float* out) {
                       const int left = c.vocabulary - panel * PANEL;
                       const int columns = left < PANEL ? left : PANEL;
                       for (int r = 0; r < count; r++)
                         memcpy(step.logits + static_cast<size_t>(first + r) * c.vocabulary +
                                    panel * PANEL,
                                out + r * PANEL, sizeof(float) * columns);
                     });
}

template <class T>
static void run_stage(Stage& stage, int thread) {
  enter<T>(stage, thread);
  const int threads = stage.config.threads;
  const bool apart = threads > 1 && stage.config.ranks == 1 && !stage.step.ask &&
                     stage.step.tokens >= 2 * ROWS_APART * threads;
  (apart ? run_apart<T> : run_together<T>)(stage, thread);
  if (stage.verdict != ABANDON) leave<T>(stage, thread);
}
