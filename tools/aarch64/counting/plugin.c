/* QEMU plugin (user mode, plugin API version 1, as in QEMU 7.2): which code ran, and how often, inside marked regions.
 *
 * The guest marks a region by prctl(MARK, START or STOP, id), an unknown option that the kernel answers by EINVAL (regions.py).
 * Into out=FILE goes one line for each block of code when a region first runs it, and at each STOP what ran since START:
 *   block INDEX ADDRESS WORD...     the instructions, hexadecimal
 *   region ID INDEX:TIMES ...
 * What an instruction is and costs is decided by the reader (a53.py). Counts are exact for a program of one thread.
 *
 * Debian packages no qemu-plugin.h, so what is used of it is declared here. */
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
extern void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*)(uint64_t id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int add_u64, void *counter, uint64_t value);
extern void qemu_plugin_register_vcpu_syscall_cb(uint64_t id, void (*)(uint64_t id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2,
                                                                      uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7,
                                                                      uint64_t a8));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t index);
extern uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

#define PUBLIC __attribute__((visibility("default")))
PUBLIC int qemu_plugin_version = 1;

enum { PRCTL = 167, MARK = 0x74746d6b, START = 1, STOP = 2 };

struct block {
  struct block *next;
  uint64_t times, at_start, address;
  long index; /* -1 until it is written */
  size_t count;
  uint32_t words[];
};

static struct block *blocks;
static long written;
static FILE *out;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void translated(uint64_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  const size_t count = qemu_plugin_tb_n_insns(tb);
  struct block *b = calloc(1, sizeof *b + count * sizeof b->words[0]);
  if (b == NULL) abort();
  b->address = qemu_plugin_insn_vaddr(qemu_plugin_tb_get_insn(tb, 0));
  b->index = -1;
  b->count = count;
  for (size_t i = 0; i < count; i++) memcpy(&b->words[i], qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), sizeof b->words[i]);
  qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &b->times, 1);
  pthread_mutex_lock(&mutex);
  b->next = blocks;
  blocks = b;
  pthread_mutex_unlock(&mutex);
}

static void system_call(uint64_t id, unsigned cpu, int64_t number, uint64_t mark, uint64_t command, uint64_t region, uint64_t a4,
                        uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  (void)id, (void)cpu, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != PRCTL || mark != MARK) return;
  pthread_mutex_lock(&mutex);
  if (command == START) {
    for (struct block *b = blocks; b; b = b->next) b->at_start = b->times;
  } else if (command == STOP) {
    for (struct block *b = blocks; b; b = b->next) {
      if (b->times == b->at_start || b->index >= 0) continue;
      b->index = written++;
      fprintf(out, "block %ld %" PRIx64, b->index, b->address);
      for (size_t i = 0; i < b->count; i++) fprintf(out, " %08" PRIx32, b->words[i]);
      fputc('\n', out);
    }
    fprintf(out, "region %" PRIu64, region);
    for (struct block *b = blocks; b; b = b->next) {
      if (b->times != b->at_start) fprintf(out, " %ld:%" PRIu64, b->index, b->times - b->at_start);
    }
    fputc('\n', out);
    fflush(out);
  }
  pthread_mutex_unlock(&mutex);
}

PUBLIC int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
  (void)info;
  for (int i = 0; i < argc; i++) {
    if (strncmp(argv[i], "out=", 4) == 0) out = fopen(argv[i] + 4, "w");
  }
  if (out == NULL) {
    fprintf(stderr, "counting plugin: out=FILE names no file that can be written\n");
    return 1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, system_call);
  return 0;
}
