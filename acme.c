/*
 * acme-step - an ACME client (RFC 8555) that does one step in each run
 *
 *	acme-step COMMAND [OPTION...] [ARGUMENT...]
 *
 *	acme-step new-order -a account example.com |
 *	acme-step respond -t http-01 -w /var/www/acme |
 *	acme-step finalize -K example.pem -o fullchain.pem
 *
 * A command reads its files and, on standard input, the record of an
 * earlier step. It makes a few requests over one connection, writes its
 * result when that is complete, and exits with a status that a script can
 * act on (DONE to SIGNAL below). It keeps no state of its own.
 *
 * Contents:
 *   1. Text                 22. Processes            43. Looks
 *   2. Messages             23. Name look-up         44. HTTP look
 *   3. Clean-up             24. Dialing              45. TLS-ALPN look
 *   4. Signals              25. Proxies              46. DNS questions
 *   5. Memory               26. Connection           47. DNS look
 *   6. Strings              27. HTTP                 48. Peers
 *   7. Encodings            28. Box                  49. Responder process
 *   8. JSON                 29. Identifiers          50. Look processes
 *   9. DER                  30. Order                51. Listening
 *  10. Time                 31. Record               52. Hook styles
 *  11. Reading files        32. Problems             53. Hooks
 *  12. Writing files        33. Directory and nonces 54. Publishing
 *  13. PEM                  34. Signed requests      55. Finalization
 *  14. Keys                 35. Accounts             56. Key commands
 *  15. Addresses and URLs   36. Authorizations       57. Account commands
 *  16. Certificates         37. Waiting              58. Order commands
 *  17. Certificate requests 38. Challenges           59. Certificate commands
 *  18. Trust anchors        39. Publishing files     60. Raw requests
 *  19. Name constraints     40. HTTP responder       61. Table
 *  20. Validation           41. TLS-ALPN responder   62. Main
 *  21. TLS                  42. DNS responder
 *
 * Each section uses only those above it.
 *
 * All data are Strs: bytes with a length, never modified in place.
 * Sections 6 to 9 make new ones from old ones: cat() joins, text() fills a
 * template, b64() and quote() encode, der() nests. Memory comes from one
 * static heap, and nothing is freed one by one. Any failure calls die(),
 * which ends the step; leave() then runs the clean-up handlers.
 *
 * To understand the rest, read struct order in section 30, which is all
 * that flows through a pipe, then the table in section 61, one command, for
 * example do_new_order(), and acme_batch() in section 34, which sends every
 * signed request.
 */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE		/* getentropy, syscall */
#define _GNU_SOURCE		/* getpagesize, prlimit */
#include <sys/types.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <netdb.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <bearssl.h>

#define VERSION "1.0"

/*
 * Limits. Exceeding one is an error with a message; nothing is truncated.
 * Those that only one section uses are there.
 */
enum {
	HEAP     = 3 << 20,	/* of a step; unused pages are free */
	INPUT    = 256 << 10,	/* a file or standard input */
	HEAD     = 16 << 10,	/* a response's header */
	BODY     = 256 << 10,	/* a response's body; a chain has 10 KB */
	DEPTH    = 64,		/* of nested JSON; ACME needs 6 */
	NAMES    = 250,		/* in an order; Let's Encrypt allows 100 */
	CHALLENGES = 5 * NAMES,	/* of an order; CAs offer 1 to 4 for a name */
	SLOTS    = 1024,	/* for NAMES in a hash table: 4 for each */
	ORIGINS  = 16,		/* that the user allows */
	LISTED   = 100,		/* contacts that a CA lists for an account */
	OTHERS   = 1024,	/* lines of a record with unknown keywords */
	WORD     = 2048,	/* a field of a record, a URL */
	CONTACTS = 10,		/* of an account */
	CERTS    = 10,		/* in a chain; Let's Encrypt's have up to 4 */
	CERT     = 16 << 10,	/* a certificate, such as one with 250 names */
	ANCHORS  = 16,		/* trust anchors whose names are in a chain */
	HOSTNAME = 255,		/* RFC 1035 2.3.4 */
	COMMON   = 64,		/* characters of -N: RFC 5280 A.1 */
	PORT     = 5,		/* digits of a port number, ... */
	MAX_PORT = 65535,	/* ... and the largest one */
	TOKEN    = 200,		/* of a challenge; it becomes a file name */
	NONCE    = 250,		/* RFC 8555 has no limit; Boulder's have 43 */
	WINDOW   = 32,		/* requests under way at once */
	NONCES   = 8,		/* requested at once, for rate limits */
	TRIES    = 3,		/* of a request that meets server errors */
	RESENDS  = 2,		/* of a request whose response was lost */
	REFUSALS = 20,		/* rounds of badNonce without a pause */
	LAG      = 10,		/* seconds until all of a CA knows a new URL */
	PAGES    = 1000,	/* of an account's list of orders */
	MESSAGE  = 2000,	/* bytes of one, which is a line of a log */
	REMEDY   = 300,		/* of these, for the remedy at its end */
	LIST     = 1000,	/* bytes of a list in a message */
	DETAIL   = 500,		/* of a problem; Boulder's have up to 400 */
	BRIEF    = 200,		/* of any other value in a message */
	CONNECT  = 10,		/* seconds for each address of a name */
	EARLY    = 10,		/* seconds for a connection made early */
	IDLE     = 20,		/* seconds until a NAT may forget one */
	ADDRESSES = 16,		/* of a name and family; more are not tried */
	ATTEMPTS = 8,		/* connections tried at once */
	HEAD_START = 250,	/* ms until the next address (RFC 8305 5) */
	LATE_IPV6 = 50,		/* ms by which AAAA may be late (RFC 8305 3) */
	RESOLVED = 16,		/* addresses of -H and ACME_RESOLVE */
	RESIDUE  = 16 << 10,	/* stack below a use of keys; BearSSL: 6 KB */
	MAX_WAIT = 86400 * 30	/* seconds for -T and -s */
};

enum { EXPONENT = 65537 };	/* of RSA keys that we make, public */

/* When the program was released: a clock that shows less is wrong. */
#define RELEASED 1795910400LL	/* 2026-11-29T00:00:00Z */

enum {			/* exit statuses; most are those of sysexits.h */
	DONE     = 0,
	NO       = 1,	/* the answer is no */
	USAGE    = 64,
	BAD      = 65,	/* a record, key, CSR or certificate */
	MISSING  = 66,	/* an input file */
	CA_DOWN  = 69,	/* name, connection, TLS, HTTP 5xx */
	FAULT    = 70,	/* a limit above, or a fault in the program */
	NO_PLACE = 73,	/* cannot create the output, or publish */
	IO       = 74,	/* reading or writing failed */
	LATER    = 75,	/* rate limit, time limit */
	BROKEN   = 76,	/* the response breaks HTTP, JSON or ACME */
	REFUSED  = 77,	/* a problem document, an invalid order */
	CONFIG   = 78,	/* the CA's certificate is not trusted; -d is wrong */
	SIGNAL   = 128	/* and the signal's number */
};

/* ------------------------------------------------------------- 1. Text -- */

/* Bytes with a length: the one type of all data; they never change. */
typedef struct {
	const unsigned char *p;
	size_t n;
} Str;

#define COUNT(a)  (sizeof(a) / sizeof (a)[0])
#define S(lit)    ((Str){ (const unsigned char *)(lit), sizeof(lit) - 1 })
#define NONE      ((Str){ 0, 0 })
#define STRS(...) COUNT(((Str[]){ __VA_ARGS__ })), __VA_ARGS__	/* n, strings */

/*
 * Each gap, "%", of a template is filled with the next of the strings that
 * follow it. The macros around such functions let the compiler check that
 * every argument is a Str.
 */
#define ALL_STR(template, ...)  ((void)sizeof((Str[]){ __VA_ARGS__ }))

static Str
str(const char *s)
{
	return (Str){ (const unsigned char *)s, s ? strlen(s) : 0 };
}

/* The meaning of errno. */
static Str
why(void)
{
	return str(strerror(errno));
}

/* Write all of s; false, with errno, on failure. */
static bool
write_all(int fd, Str s)
{
	while (s.n > 0) {
		ssize_t n = write(fd, s.p, s.n);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		s = (Str){ s.p + n, s.n - (size_t)n };
	}
	return true;
}

/* The length of the well-formed character at s (RFC 3629 4), or 0. */
static size_t
utf8(Str s)
{
	unsigned c = s.p[0], d = s.n > 1 ? s.p[1] : 0;
	size_t n = 1U + (c >= 0xc0) + (c >= 0xe0) + (c >= 0xf0);

	if ((c >= 0x80 && c < 0xc2) || c > 0xf4)
		return 0;
	if (n > s.n || (c == 0xe0 && d < 0xa0) || (c == 0xed && d > 0x9f) ||
	    (c == 0xf0 && d < 0x90) || (c == 0xf4 && d > 0x8f))
		return 0;
	for (size_t i = 1; i < n; i++)
		if ((s.p[i] & 0xc0) != 0x80)
			return 0;
	return n;
}

/*
 * The same, but 0 also for characters that could move a terminal's cursor
 * or reverse its text: controls, line separators, direction marks.
 */
static size_t
harmless(Str s)
{
	size_t n = utf8(s);
	unsigned c = s.p[0], d = n > 1 ? s.p[1] : 0, e = n > 2 ? s.p[2] : 0;

	if (c < 0x20 || c == 0x7f || (c == 0xc2 && d < 0xa0) ||
	    (c == 0xd8 && d == 0x9c) ||
	    (c == 0xe2 && d == 0x80 && (e == 0x8e || e == 0x8f)) ||
	    (c == 0xe2 && d == 0x80 && e >= 0xa8 && e <= 0xae) ||
	    (c == 0xe2 && d == 0x81 && e >= 0xa6 && e <= 0xa9))
		return 0;
	return n;
}

/* --------------------------------------------------------- 2. Messages -- */

static Str step;		/* the command, for messages */
static Str preamble, remedy;	/* of the message of a failure */
static bool on_record_pipe;	/* standard output is a pipe for a record */

/* A line being written, in a buffer that needs no heap. */
static struct {
	int fd;
	size_t n, room;		/* bytes in b; bytes that may be added */
	unsigned char b[512];
} line;

static void
line_flush(void)
{
	write_all(line.fd, (Str){ line.b, line.n });
	line.n = 0;
}

/* Add a text; "..." takes the place of what would exceed the line's room. */
static void
line_add(Str s)
{
	while (s.n > 0 && line.room > 0) {
		size_t good = harmless(s), n = good ? good : 1;

		if (line.n + 5 > sizeof line.b)
			line_flush();
		if (n + 3 > line.room) {
			memcpy(line.b + line.n, "...", 3);
			line.n += 3;
			line.room = 0;
			return;
		}
		memcpy(line.b + line.n, good ? s.p : S("?").p, n);
		line.n += n;
		line.room -= n;
		s = (Str){ s.p + n, s.n - n };
	}
}

static void
line_begin(int fd)
{
	line.fd = fd;
	line.n = 0;
	line.room = MESSAGE;
}

static void
line_end(void)
{
	line.b[line.n++] = '\n';
	line_flush();
}

/*
 * The next piece of a filled template: the text up to a gap, or the string
 * that fills the gap. False at the end.
 */
static bool
piece(const char **template, va_list *ap, Str *s)
{
	size_t n = strcspn(*template, "%");

	if (!**template)
		return false;
	*s = (Str){ (const unsigned char *)*template, n };
	if (n == 0) {
		*s = va_arg(*ap, Str);
		n = 1;
	}
	*template += n;
	return true;
}

static void
line_fill(const char *template, va_list *ap)
{
	Str s;

	while (piece(&template, ap, &s))
		line_add(s);
}

/* Print one line on standard error; nothing in it can begin another. */
#define warn(...)  (ALL_STR(__VA_ARGS__, NONE), say(__VA_ARGS__))

static void
say_begin(void)
{
	line_begin(2);
	line_add(S("acme-step: "));
	line_add(step);
	line_add(step.n ? S(": ") : NONE);
}

static void
say(const char *template, ...)
{
	va_list ap;

	va_start(ap, template);
	say_begin();
	line_fill(template, &ap);
	line_end();
	va_end(ap);
}

enum { DIGITS = 20 };		/* of the largest 64-bit number */

/* A decimal number, in the caller's buffer. */
static Str
decimal(unsigned long long n, unsigned char b[DIGITS])
{
	size_t i = DIGITS;

	do
		b[--i] = (unsigned char)('0' + n % 10);
	while (n /= 10);
	return (Str){ b + i, DIGITS - i };
}

/*
 * Begin the line that tells the pipeline's next step that this one failed;
 * false if there is no next step.
 */
static bool
begin_failed_line(int status, Str name)
{
	unsigned char b[DIGITS];
	struct stat st;

	if (!on_record_pipe || fstat(1, &st) != 0 ||
	    (!S_ISFIFO(st.st_mode) && !S_ISSOCK(st.st_mode)))
		return false;
	line_begin(1);
	line_add(S("failed "));
	line_add(decimal((unsigned)status, b));
	line_add(S(" "));
	line_add(name.n ? name : S("acme-step"));
	line_add(S(" "));
	return true;
}

/* --------------------------------------------------------- 3. Clean-up -- */

/*
 * Clean-up actions, run in reverse order at the end of the step: they
 * remove unfinished or published files, call hooks, end other processes.
 * The first place is for the process that carries the connection (-P),
 * since that can be replaced.
 */
static struct cleanup {
	void (*end)(const struct cleanup *);	/* NULL: none */
	int n;			/* a directory or a process */
	const void *p;		/* a file's name or a hook */
} cleanup[NAMES + 8];
static volatile size_t ncleanup = 1;

static unsigned char heap[HEAP];	/* secrets can be anywhere in it */
static size_t used, peak;		/* bytes in use; the most so far */

/* Other memory with secrets, which are wiped when the process exits. */
static struct {
	void *p;
	size_t n;
} secret[8];
static size_t nsecret;
static unsigned char *stack_end;	/* in main's frame: others are below */

static void
block_signals(sigset_t *old)
{
	sigset_t all;

	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, old);
}

/*
 * Register a clean-up action, with signals blocked so that no handler sees
 * half of it.
 */
static void
add_cleanup(void (*end)(const struct cleanup *), int n, const void *p)
{
	sigset_t old;

	block_signals(&old);
	cleanup[ncleanup].end = end;
	cleanup[ncleanup].n = n;
	cleanup[ncleanup].p = p;
	ncleanup++;
	sigprocmask(SIG_SETMASK, &old, NULL);
}

/*
 * Clean-up that failed. The warnings wait until signals are unblocked:
 * writing them can block, since standard error can be a full pipe.
 */
static struct {
	const char *template;		/* with two gaps */
	Str a, b;
} late_warning[COUNT(cleanup)];
static size_t nlate_warning;

static void
warn_later(const char *template, Str a, Str b)
{
	late_warning[nlate_warning].template = template;
	late_warning[nlate_warning].a = a;
	late_warning[nlate_warning++].b = b;
}

static void
warn_now(void)
{
	for (size_t i = 0; i < nlate_warning; i++)
		say(late_warning[i].template, late_warning[i].a,
		    late_warning[i].b);
	nlate_warning = 0;
}

/* Run the newest actions until n are left; signals must be blocked. */
static void
run_cleanup(size_t n)
{
	while (ncleanup > n) {
		struct cleanup newest = cleanup[ncleanup - 1];

		ncleanup--;
		if (newest.end)
			newest.end(&newest);
	}
}

/* The same from where signals are not blocked. */
static void
clean_up_to(size_t n)
{
	sigset_t old;

	block_signals(&old);
	run_cleanup(n);
	sigprocmask(SIG_SETMASK, &old, NULL);
	warn_now();
}

/* Cancel the newest clean-up action: its object is finished. */
static void
cancel_cleanup(void)
{
	ncleanup--;
}

static void
remove_file(const struct cleanup *c)
{
	if (unlinkat(c->n, c->p, 0) != 0 && errno != ENOENT)
		warn_later("cannot remove %: %", str(c->p), why());
}

static void
wipe(volatile void *p, size_t n)
{
	for (volatile unsigned char *b = p; n > 0; n--)
		*b++ = 0;
}

/* Overwrite what calls that have returned left below the caller's frame. */
static void wipe_stack(void) __attribute__((noinline));

static void
wipe_stack(void)
{
	unsigned char below[RESIDUE];

	wipe(below, sizeof below);
}

static void
wipe_secrets(void)
{
	for (size_t i = 0; i < nsecret; i++)
		wipe(secret[i].p, secret[i].n);
}

static void wipe_and_exit(int) __attribute__((noinline, noreturn,
    no_stack_protector, no_sanitize("address")));

/*
 * Overwrite the stack, from below this frame up to main's, and exit. It
 * overwrites its own frame too, so it keeps nothing there.
 */
static void
wipe_and_exit(int status)
{
	static volatile unsigned char *volatile p;
	static volatile int keep_status;
	volatile unsigned char below[RESIDUE];

	keep_status = status;
	for (p = below; p < stack_end; p++)
		*p = 0;
	_exit(keep_status);
}

static void leave(int) __attribute__((noreturn));
static void fail_by(int, const char *, va_list *) __attribute__((noreturn));
static void fail(int, const char *, ...) __attribute__((noreturn));

enum { LAST_WORDS = 3 };	/* seconds that the last messages may take */

/* The end of the step, for on_signal(). */
enum { NOT_BEGUN, CLEANING_UP, CLEANED_UP };
static struct {
	volatile sig_atomic_t phase;
	volatile int status;		/* of the step, once CLEANED_UP */
} leaving;

/*
 * Run all clean-up actions. The messages that follow can block: LAST_WORDS
 * or a signal ends the step then, but a signal that came before does not.
 */
static void
finish(int status)
{
	sigset_t none;

	block_signals(NULL);
	leaving.phase = CLEANING_UP;
	run_cleanup(0);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	leaving.status = status;
	leaving.phase = CLEANED_UP;
	alarm(LAST_WORDS);
	warn_now();
}

/* The only way to exit: nothing unfinished and nothing secret is left. */
static void
leave(int status)
{
	if (leaving.phase != CLEANED_UP)
		finish(status);
	block_signals(NULL);
	wipe_secrets();
	wipe(heap, peak);
	wipe_and_exit(status);
}

/* However long the message is, there is room for its remedy. */
static void
line_message(const char *template, va_list *ap)
{
	size_t reserve = 3 + (remedy.n < REMEDY ? remedy.n : REMEDY);

	line.room -= reserve;
	line_add(preamble);
	line_fill(template, ap);
	line.room += reserve;
	line_add(remedy);
	line_end();
}

/* End the step with a message: action, object, cause. */
#define die(status, ...) \
    (ALL_STR(__VA_ARGS__, NONE), fail(status, __VA_ARGS__))

static sigjmp_buf *retreat;	/* where a failure without effect returns to */
static Str looking_for;		/* in a process that looks: the name, ... */
static Str looking_at;		/* ... and the place where it looks */

/* Begin a line of the report of a look (section 43). */
static void
begin_report(const char *kind)
{
	line_begin(1);
	line_add(str(kind));
	line_add(looking_for);
	line_add(S(": "));
	line_add(looking_at);
	line_add(S(": "));
}

/* The next step is told first: it reads, but standard error can be stuck. */
static void
fail_by(int status, const char *template, va_list *ap)
{
	va_list again;

	va_copy(again, *ap);
	if (retreat && looking_for.n) {
		begin_report("-");
		line_message(template, ap);
	}
	if (retreat)
		siglongjmp(*retreat, 1);
	finish(status);
	if (begin_failed_line(status, step))
		line_message(template, &again);
	say_begin();
	line_message(template, ap);
	leave(status);
}

static void
fail(int status, const char *template, ...)
{
	va_list ap;

	va_start(ap, template);
	fail_by(status, template, &ap);
}

/* ---------------------------------------------------------- 4. Signals -- */

static struct rlimit core_limit;	/* as the step was started with */

/*
 * What the step is doing, and its exit status if the time limit is reached
 * meanwhile.
 */
static struct {
	const char *volatile what;
	volatile int status;
	const char *volatile object;
	unsigned limit;			/* -T */
} activity = { "working", LATER, "", 300 };

/*
 * Call it before what can block. The strings must last until the next call;
 * `what` ends with a space if there is an object.
 */
static void
doing(int status, const char *what, const char *object)
{
	activity.status = status;
	activity.object = "";
	activity.what = what;
	activity.object = object;
}

/* Is respond waiting for the CA to validate what is published? */
static volatile sig_atomic_t validating;

/* The remedy if the time limit ends that wait, or NONE. */
static Str
limit_hint(void)
{
	return validating ? S("; what was published is removed now, so the CA "
	    "may fail to validate: if the order becomes invalid, place a new "
	    "one and raise -T") : NONE;
}

/*
 * Signals end the step at any point; SIGALRM is its time limit, which bounds
 * everything that can block.  fail() calls only functions that are safe in a
 * handler (POSIX.1-2008 XSH 2.4.3).
 */
static void
on_signal(int sig)
{
	unsigned char b[DIGITS];

	if (leaving.phase == CLEANING_UP)
		return;
	if (leaving.phase == CLEANED_UP)
		leave(leaving.status);
	retreat = NULL;
	preamble = NONE;	/* it is for a failure that has not happened */
	if (sig != SIGALRM)
		die(SIGNAL + sig, "ended by signal %",
		    decimal((unsigned)sig, b));
	if (validating)
		remedy = limit_hint();
	/* No cat(): the handler may have interrupted one. */
	if (!*activity.object)
		die(activity.status, "time limit of % s reached while %",
		    decimal(activity.limit, b), str(activity.what));
	die(activity.status, "time limit of % s reached while % %",
	    decimal(activity.limit, b), str(activity.what),
	    str(activity.object));
}

static void
catch_signals(void)
{
	static const int caught[] = { SIGHUP, SIGINT, SIGQUIT, SIGTERM,
	    SIGXCPU, SIGXFSZ, SIGALRM };
	struct sigaction act = { .sa_handler = on_signal }, old;

	sigfillset(&act.sa_mask);
	for (size_t i = 0; i < COUNT(caught); i++)
		if (sigaction(caught[i], NULL, &old) == 0 &&
		    (old.sa_handler != SIG_IGN || caught[i] == SIGALRM))
			sigaction(caught[i], &act, NULL);
	/* Our parent may have blocked them: -T would have no effect. */
	sigemptyset(&act.sa_mask);
	for (size_t i = 0; i < COUNT(caught); i++)
		sigaddset(&act.sa_mask, caught[i]);
	sigprocmask(SIG_UNBLOCK, &act.sa_mask, NULL);
	act.sa_handler = SIG_IGN;
	sigaction(SIGPIPE, &act, NULL);
	act.sa_handler = SIG_DFL;	/* SIG_IGN would make wait() fail */
	sigaction(SIGCHLD, &act, NULL);
}

/* ----------------------------------------------------------- 5. Memory -- */

/*
 * Allocate n bytes. Nothing is freed one by one; keep() and resetting
 * `used` drop all that is newer than a mark.
 */
static unsigned char *
alloc(size_t n)
{
	if (n > sizeof heap - used)
		die(FAULT, "out of memory: a step has 3 MiB");
	used += n;
	if (used > peak)
		peak = used;
	return heap + used - n;
}

/* Free all that is newer than mark, except s, which moves there. */
static Str
keep(size_t mark, Str s)
{
	if (s.n)
		memmove(heap + mark, s.p, s.n);
	used = mark + s.n;
	return (Str){ heap + mark, s.n };
}

/* Let the exit wipe n bytes that are not on the heap; 8 calls at most. */
static void
wipe_at_end(void *p, size_t n)
{
	secret[nsecret].p = p;
	secret[nsecret++].n = n;
}

/* ---------------------------------------------------------- 6. Strings -- */

/*
 * Join any number of strings. If the first is the newest on the heap, it
 * grows in place, so that a string built piece by piece is not copied again
 * each time; cat(NONE, ...) always makes a new string.
 */
#define cat(...)  join(STRS(__VA_ARGS__))

static Str
join_all(size_t n, va_list *ap)
{
	Str next = va_arg(*ap, Str), s = { heap + used, 0 };

	if (next.n && next.p + next.n == s.p) {
		s = next;
		next = NONE;
	}
	for (;; next = va_arg(*ap, Str)) {
		if (next.n)
			memcpy(alloc(next.n), next.p, next.n);
		s.n += next.n;
		if (--n == 0)
			return s;
	}
}

static Str
join(size_t n, ...)
{
	Str s;
	va_list ap;

	va_start(ap, n);
	s = join_all(n, &ap);
	va_end(ap);
	return s;
}

/* Fill a template, as a new string on the heap. */
#define text(...)  (ALL_STR(__VA_ARGS__, NONE), make_text(__VA_ARGS__))

static Str
make_text(const char *template, ...)
{
	Str all = { heap + used, 0 }, s;
	va_list ap;

	va_start(ap, template);
	for (; piece(&template, &ap, &s); all.n += s.n)
		if (s.n)
			memcpy(alloc(s.n), s.p, s.n);
	va_end(ap);
	return all;
}

/* End the step because of the way it was called. */
#define usage(...)  (ALL_STR(__VA_ARGS__, NONE), fail_usage(__VA_ARGS__))

static void fail_usage(const char *, ...) __attribute__((noreturn));

static void
fail_usage(const char *template, ...)
{
	Str call = step.n ? cat(S("help "), step) : S("help");

	va_list ap;

	remedy = text(" (see acme-step %)", call);
	va_start(ap, template);
	fail_by(USAGE, template, &ap);
}

static bool
same(Str a, Str b)
{
	return a.n == b.n && (a.n == 0 || memcmp(a.p, b.p, a.n) == 0);
}

static bool
has_prefix(Str s, Str prefix)
{
	return s.n >= prefix.n && same((Str){ s.p, prefix.n }, prefix);
}

static bool
contains(Str s, Str part)
{
	for (; s.n >= part.n; s = (Str){ s.p + 1, s.n - 1 })
		if (has_prefix(s, part))
			return true;
	return false;
}

/* Is s this constant? */
static bool
is(Str s, const char *constant)
{
	return same(s, str(constant));
}

/* Does s begin with this constant? */
static bool
begins(Str s, const char *constant)
{
	return has_prefix(s, str(constant));
}

/* All but the first n bytes. */
static Str
from(Str s, size_t n)
{
	return n < s.n ? (Str){ s.p + n, s.n - n } : (Str){ s.p + s.n, 0 };
}

/* Take what is before the first c off the front of s, and remove that c. */
static Str
cut(Str *s, int c)
{
	const unsigned char *at = s->n ? memchr(s->p, c, s->n) : NULL;
	Str head = { s->p, at ? (size_t)(at - s->p) : s->n };

	*s = from(*s, head.n + 1);
	return head;
}

/* The same, except that a c in quotes does not count (RFC 9110 5.6.4). */
static Str
cut_unquoted(Str *s, int c)
{
	bool quoted = false;
	size_t n = 0;
	Str head;

	for (; n < s->n && (quoted || s->p[n] != c); n++)
		if (s->p[n] == '"')
			quoted = !quoted;
		else if (quoted && s->p[n] == '\\' && n + 1 < s->n)
			n++;
	head = (Str){ s->p, n };
	*s = from(*s, n + 1);
	return head;
}

static unsigned char
lower_case(unsigned char c)
{
	return (unsigned char)(c >= 'A' && c <= 'Z' ? c + 'a' - 'A' : c);
}

/* At most n bytes of s, to a character's end, and "..." if that is less. */
static Str
shorten(Str s, size_t n)
{
	if (s.n <= n)
		return s;
	while (n > 0 && (s.p[n] & 0xc0) == 0x80)
		n--;
	return text("%...", (Str){ s.p, n });
}

/* The beginning of a value, for a message. */
static Str
brief(Str s)
{
	return shorten(s, BRIEF);
}

/*
 * A text as a message would show it, for print(): a byte that is not
 * harmless() becomes "?".
 */
static Str
shown(Str s)
{
	unsigned char *p = alloc(s.n);
	size_t at = 0;

	while (at < s.n) {
		size_t good = harmless(from(s, at)), n = good ? good : 1;

		memcpy(p + at, good ? s.p + at : S("?").p, n);
		at += n;
	}
	return (Str){ p, s.n };
}

/* In lower case, if ASCII: names and header fields are nothing else. */
static Str
lower(Str s)
{
	unsigned char *p = alloc(s.n);

	for (size_t i = 0; i < s.n; i++)
		p[i] = lower_case(s.p[i]);
	return (Str){ p, s.n };
}

/* Case-insensitively. */
static bool
same_nocase(Str a, Str b)
{
	size_t i = 0;

	if (a.n != b.n)
		return false;
	while (i < a.n && lower_case(a.p[i]) == lower_case(b.p[i]))
		i++;
	return i == a.n;
}

static Str
trim(Str s)
{
	while (s.n && (s.p[0] == ' ' || s.p[0] == '\t'))
		s = from(s, 1);
	while (s.n && (s.p[s.n - 1] == ' ' || s.p[s.n - 1] == '\t'))
		s.n--;
	return s;
}

/*
 * A variable of the environment, NONE if it is not set. White space around
 * its value is ignored: secrets read from files end with a newline.
 */
static Str
variable(const char *name)
{
	Str s = str(getenv(name));

	while (s.n && s.p[0] <= ' ')
		s = from(s, 1);
	while (s.n && s.p[s.n - 1] <= ' ')
		s.n--;
	return s;
}

/* Take the first word off a text, and the white space before it. */
static Str
take_word(Str *s)
{
	size_t n = 0;

	while (s->n && s->p[0] <= ' ')
		*s = from(*s, 1);
	while (n < s->n && s->p[n] > ' ')
		n++;
	*s = from(*s, n);
	return (Str){ s->p - n, n };
}

/* Does s have only characters of a set, and at least one? */
static bool
made_of(Str s, const char *set)
{
	for (size_t i = 0; i < s.n; i++)
		if (!s.p[i] || !strchr(set, s.p[i]))
			return false;
	return s.n > 0;
}

#define DIGIT "0123456789"
#define ALPHA "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

/* Read a decimal number; false if it is malformed or larger than max. */
static bool
number(Str s, unsigned long max, unsigned long *n)
{
	if (!made_of(s, DIGIT))
		return false;
	for (*n = 0; s.n; s = from(s, 1)) {
		unsigned long d = s.p[0] - (unsigned long)'0';

		if (*n > (max - d) / 10)
			return false;
		*n = *n * 10 + d;
	}
	return true;
}

static Str
num(unsigned long long n)
{
	return decimal(n, alloc(DIGITS));
}

/*
 * A list being built on the heap. Call list_begin() before anything that
 * items are made of is allocated: list_add() frees all that is newer.
 * Once a list in a message has LIST bytes, further items are only counted.
 */
struct list {
	size_t mark;		/* where it begins on the heap */
	size_t n;		/* its bytes */
	size_t limit;		/* of them */
	size_t more;		/* items that were only counted */
};

static struct list
list_begin(void)
{
	return (struct list){ .mark = used, .limit = LIST };
}

/* A list that is not for a message: it has no limit. */
static struct list
text_begin(void)
{
	return (struct list){ .mark = used, .limit = HEAP };
}

static void
list_add(struct list *l, const char *separator, Str item)
{
	Str gap = l->n ? str(separator) : NONE;
	unsigned char *end;

	if (l->more || (l->n && l->n + item.n > l->limit)) {
		l->more++;
		return;
	}
	item = shorten(item, l->limit);
	used = l->mark + l->n;
	end = alloc(gap.n + item.n);
	if (item.n)
		memmove(end + gap.n, item.p, item.n);
	if (gap.n)
		memcpy(end, gap.p, gap.n);
	l->n += gap.n + item.n;
}

static Str
list_text(const struct list *l)
{
	Str all = { heap + l->mark, l->n };

	return l->more ? text("%, and % more", all, num(l->more)) : all;
}

/* The names with which the rows of a table begin, in one line. */
#define NAMES_OF(table)  row_names(table, sizeof (table)[0], COUNT(table))

static Str
row_names(const void *row, size_t size, size_t n)
{
	struct list all = list_begin();

	for (const char *name = row; n > 0; n--, name += size)
		list_add(&all, " ", str(name));
	return list_text(&all);
}

/* For system calls; s must have no NUL in it. */
static const char *
c_str(Str s)
{
	return (const char *)cat(NONE, s, S("\0")).p;
}

/* -------------------------------------------------------- 7. Encodings -- */

static const char BASE64URL[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/*
 * Encode in characters of `width` bits each, most significant first, without
 * padding (RFC 4648).
 */
static Str
encode(Str s, const char *alphabet, int width)
{
	unsigned char *to = alloc((s.n * 8 + (size_t)width - 1) /
	    (size_t)width);
	unsigned acc = 0, mask = (1U << width) - 1;
	size_t n = 0;
	int have = 0;

	for (size_t i = 0; i < s.n; i++) {
		acc = (acc << 8 | s.p[i]) & 0xffff;
		for (have += 8; have >= width; have -= width)
			to[n++] = (unsigned char)
			    alphabet[acc >> (have - width) & mask];
	}
	if (have)
		to[n++] = (unsigned char)
		    alphabet[acc << (width - have) & mask];
	return (Str){ to, n };
}

/* Base64url without padding (RFC 4648 5), which ACME uses (RFC 8555 6.1). */
static Str
b64(Str s)
{
	return encode(s, BASE64URL, 6);
}

/* A copy with two characters in place of two others. */
static Str
translate(Str s, const char *set, const char *to)
{
	unsigned char *p = alloc(s.n);

	for (size_t i = 0; i < s.n; i++) {
		p[i] = s.p[i];
		for (size_t k = 0; k < 2; k++)
			if (s.p[i] == (unsigned char)set[k])
				p[i] = (unsigned char)to[k];
	}
	return (Str){ p, s.n };
}

/* Base64 with padding (RFC 4648 4), as in PEM and HTTP. */
static Str
base64(Str s)
{
	Str all = translate(b64(s), "-_", "+/");

	while (all.n % 4)
		all = cat(all, S("="));
	return all;
}

static const char HEX[] = "0123456789abcdef";

static Str
hex(Str s)
{
	return encode(s, HEX, 4);
}

/* Decode lower-case hexadecimal digits; s must have no others. */
static Str
unhex(Str s)
{
	unsigned char *to = alloc(s.n / 2);

	for (size_t i = 0; i + 1 < s.n; i += 2)
		to[i / 2] = (unsigned char)
		    ((strchr(HEX, s.p[i]) - HEX) << 4 |
		    (strchr(HEX, s.p[i + 1]) - HEX));
	return (Str){ to, s.n / 2 };
}

/* Is s base64url, not empty, as a token must be (RFC 8555 8)? */
static bool
is_b64(Str s)
{
	return made_of(s, BASE64URL);
}

/* Decode base64url; s must pass is_b64(). */
static Str
unb64(Str s)
{
	unsigned char *to = alloc(s.n * 6 / 8);
	unsigned acc = 0;
	size_t n = 0;
	int have = 0;

	for (size_t i = 0; i < s.n; i++) {
		acc = (acc << 6 | (unsigned)(strchr(BASE64URL, s.p[i]) -
		    BASE64URL)) & 0xffff;
		if ((have += 6) >= 8)
			to[n++] = (unsigned char)(acc >> (have -= 8));
	}
	return (Str){ to, n };
}

/*
 * Decode base64 in either alphabet (RFC 4648 4 and 5), padded or not; NONE
 * if it is malformed. CAs hand out shared secrets in both.
 */
static Str
unb64_any(Str s)
{
	while (s.n && s.p[s.n - 1] == '=')
		s.n--;
	s = translate(s, "+/", "-_");
	return is_b64(s) ? unb64(s) : NONE;
}

/* In lower case, without padding (RFC 4648 6). */
static Str
base32(Str s)
{
	return encode(s, "abcdefghijklmnopqrstuvwxyz234567", 5);
}

/* ------------------------------------------------------------- 8. JSON -- */

/* A JSON string (RFC 8259 7); the bytes of s must be UTF-8. */
static Str
quote(Str s)
{
	unsigned char *to = alloc(6 * s.n + 2), *o = to;
	size_t mark = (size_t)(to - heap);

	*o++ = '"';
	for (size_t i = 0; i < s.n; i++) {
		unsigned char c = s.p[i];

		if (c < 0x20) {
			memcpy(o, "\\u00", 4);
			o[4] = (unsigned char)('0' + (c >> 4));
			o[5] = (unsigned char)HEX[c & 15];
			o += 6;
			continue;
		}
		if (c == '"' || c == '\\')
			*o++ = '\\';
		*o++ = c;
	}
	*o++ = '"';
	return keep(mark, (Str){ to, (size_t)(o - to) });
}

/*
 * Add a member to an object that is being built, still without braces. A
 * value that is NONE adds nothing: null is never sent.
 */
static Str
with(Str o, const char *name, Str value)
{
	if (!value.n)
		return o;
	return cat(o, o.n ? S(",") : NONE, quote(str(name)), S(":"), value);
}

static Str
braces(Str o)
{
	return text("{%}", o);
}

/*
 * A JSON value is the Str of its text.  json_read() checks once that a text
 * is JSON; the functions after it take such values alone, and cannot fail.
 */
struct scan {
	const unsigned char *p, *end;
	int depth;
};

static bool json_value(struct scan *);

/* The next character after white space, -1 at the end. */
static int
peek(struct scan *j)
{
	while (j->p < j->end && *j->p && strchr(" \t\r\n", *j->p))
		j->p++;
	return j->p < j->end ? *j->p : -1;
}

static bool
eat(struct scan *j, int c)
{
	if (peek(j) != c)
		return false;
	j->p++;
	return true;
}

/* Skip one character of a set; no white space before it. */
static bool
eat_one(struct scan *j, const char *set)
{
	if (j->p == j->end || *j->p == 0 || !strchr(set, *j->p))
		return false;
	j->p++;
	return true;
}

static bool
eat_many(struct scan *j, const char *set)
{
	if (!eat_one(j, set))
		return false;
	while (eat_one(j, set))
		continue;
	return true;
}

static bool
eat_name(struct scan *j, Str name)
{
	if (!has_prefix((Str){ j->p, (size_t)(j->end - j->p) }, name))
		return false;
	j->p += name.n;
	return true;
}

static bool
json_number(struct scan *j)
{
	eat_one(j, "-");
	if (!eat_one(j, "0") && !eat_many(j, DIGIT))
		return false;
	if (eat_one(j, ".") && !eat_many(j, DIGIT))
		return false;
	if (!eat_one(j, "eE"))
		return true;
	eat_one(j, "+-");
	return eat_many(j, DIGIT);
}

static bool
json_string(struct scan *j)
{
	size_t n;

	for (j->p++; j->p < j->end && *j->p >= 0x20; ) {
		if (*j->p == '"') {
			j->p++;
			return true;
		}
		if (*j->p != '\\') {
			n = *j->p < 0x80 ? 1 : utf8((Str){ j->p,
			    (size_t)(j->end - j->p) });
			if (n == 0)
				return false;
			j->p += n;
			continue;
		}
		j->p++;
		if (eat_one(j, "u")) {
			for (int i = 0; i < 4; i++)
				if (!eat_one(j, DIGIT "abcdefABCDEF"))
					return false;
		} else if (!eat_one(j, "\"\\/bfnrt"))
			return false;
	}
	return false;
}

/* An object or an array, by the character that ends it. */
static bool
json_list(struct scan *j, int close)
{
	j->p++;
	if (eat(j, close))
		return true;
	do {
		if (close == '}' &&
		    (peek(j) != '"' || !json_value(j) || !eat(j, ':')))
			return false;
		if (!json_value(j))
			return false;
	} while (eat(j, ','));
	return eat(j, close);
}

/* Skip one value of any kind (RFC 8259 3); false if it is malformed. */
static bool
json_value(struct scan *j)
{
	bool ok;

	if (++j->depth > DEPTH)
		return false;
	switch (peek(j)) {
	case '"': ok = json_string(j);		break;
	case '{': ok = json_list(j, '}');	break;
	case '[': ok = json_list(j, ']');	break;
	case 't': ok = eat_name(j, S("true"));	break;
	case 'f': ok = eat_name(j, S("false"));	break;
	case 'n': ok = eat_name(j, S("null"));	break;
	default:  ok = json_number(j);		break;
	}
	j->depth--;
	return ok;
}

/* The value that is all of s; false if s is not JSON. */
static bool
json_read(Str s, Str *value)
{
	struct scan j = { s.p, s.p + s.n, 0 };

	peek(&j);
	value->p = j.p;
	if (!json_value(&j))
		return false;
	value->n = (size_t)(j.p - value->p);
	return peek(&j) < 0;
}

/* The first character of a value, which shows its kind; 0 for NONE. */
static int
json_kind(Str v)
{
	return v.n ? v.p[0] : 0;
}

/*
 * Take the next member of an object, or element of an array, off `in`, which
 * is the whole of it at first; false at its end. The name is a JSON string,
 * or NONE in an array.
 */
static bool
json_each(Str *in, Str *name, Str *value)
{
	struct scan j = { in->p, in->p + in->n, 0 };

	*name = NONE;
	if (!eat(&j, '{') && !eat(&j, '[') && !eat(&j, ','))
		return false;
	if (peek(&j) == '}' || peek(&j) == ']')
		return false;
	value->p = j.p;
	json_value(&j);
	value->n = (size_t)(j.p - value->p);
	if (eat(&j, ':')) {
		*name = *value;
		peek(&j);
		value->p = j.p;
		json_value(&j);
		value->n = (size_t)(j.p - value->p);
	}
	*in = (Str){ j.p, (size_t)(j.end - j.p) };
	return true;
}

/* The UTF-16 code unit in four hexadecimal digits. */
static unsigned
json_unit(const unsigned char *p)
{
	unsigned u = 0;

	for (int i = 0; i < 4; i++)
		u = u << 4 | (unsigned)(p[i] <= '9' ? p[i] - '0' :
		    lower_case(p[i]) - 'a' + 10);
	return u;
}

/* Write a character in UTF-8 (RFC 3629 3); returns its length, up to 4. */
static size_t
utf8_put(unsigned char *o, unsigned u)
{
	static const unsigned char lead[] = { 0, 0, 0xc0, 0xe0, 0xf0 };
	size_t n = 1U + (u >= 0x80) + (u >= 0x800) + (u >= 0x10000);

	for (size_t i = n; i-- > 1; u >>= 6)
		o[i] = (unsigned char)(0x80 | (u & 0x3f));
	o[0] = (unsigned char)(n == 1 ? u : lead[n] | u);
	return n;
}

enum {			/* code points: surrogates (RFC 3629 3), U+FFFD */
	HIGH_SURROGATE = 0xd800,
	LOW_SURROGATE  = 0xdc00,
	LAST_SURROGATE = 0xdfff,
	REPLACEMENT    = 0xfffd
};

/*
 * Take an escape off s, which begins after the backslash. Half a surrogate
 * pair becomes U+FFFD.
 */
static unsigned
json_escape(Str *s)
{
	static const char letters[] = "bfnrt", controls[] = "\b\f\n\r\t";
	unsigned c = s->p[0], u, v;
	const char *at = strchr(letters, (int)c);

	*s = from(*s, 1);
	if (c != 'u')
		return at ? (unsigned char)controls[at - letters] : c;
	u = json_unit(s->p);
	*s = from(*s, 4);
	if (u < HIGH_SURROGATE || u > LAST_SURROGATE)
		return u;
	if (u >= LOW_SURROGATE || !begins(*s, "\\u"))
		return REPLACEMENT;
	v = json_unit(s->p + 2);
	if (v < LOW_SURROGATE || v > LAST_SURROGATE)
		return REPLACEMENT;
	*s = from(*s, 6);
	return 0x10000 + ((u - HIGH_SURROGATE) << 10) + (v - LOW_SURROGATE);
}

/* The text of a JSON string, without its quotes and escapes. */
static Str
json_text(Str v)
{
	size_t mark = used, n = 0;
	unsigned char *to;

	v = (Str){ v.p + 1, v.n - 2 };
	if (v.n == 0 || !memchr(v.p, '\\', v.n))
		return v;
	to = alloc(v.n + 3);
	while (v.n > 0) {
		unsigned char c = v.p[0];

		v = from(v, 1);
		if (c == '\\')
			n += utf8_put(to + n, json_escape(&v));
		else
			to[n++] = c;
	}
	return keep(mark, (Str){ to, n });
}

/* A member's value; NONE if it is absent or null, which ACME equates. */
static Str
json_member(Str o, const char *name)
{
	Str key, value;

	if (json_kind(o) != '{')
		return NONE;
	while (json_each(&o, &key, &value))
		if (is(json_text(key), name))
			return json_kind(value) == 'n' ? NONE : value;
	return NONE;
}

/* The text of a member that is a string, else NONE. */
static Str
text_of(Str o, const char *name)
{
	Str v = json_member(o, name);

	return json_kind(v) == '"' ? json_text(v) : NONE;
}

/* A member that is an array, else NONE. */
static Str
list_of(Str o, const char *name)
{
	Str v = json_member(o, name);

	return json_kind(v) == '[' ? v : NONE;
}

/* -------------------------------------------------------------- 9. DER -- */

enum {			/* identifier octets (X.690 8.1.2) */
	BOOLEAN   = 0x01,
	INTEGER   = 0x02,
	BITS      = 0x03,
	OCTETS    = 0x04,
	OID       = 0x06,
	UTF8      = 0x0c,
	UTC_TIME  = 0x17,
	TIME      = 0x18,
	SEQUENCE  = 0x30,
	SET       = 0x31,
	KEY_ID    = 0x80,	/* [0] of AuthorityKeyIdentifier */
	DNS_NAME  = 0x82,	/* GeneralName [2], RFC 5280 4.2.1.6 */
	IP_NAME   = 0x87,	/* GeneralName [7] */
	VERSION_0 = 0xa0,	/* [0] of RFC 5280 4.1 */
	ATTRS     = 0xa0,	/* [0] of RFC 2986 4.1 */
	EC_PUBLIC = 0xa1,	/* [1] of RFC 5915 3 */
	EXTS      = 0xa3,	/* [3] of RFC 5280 4.1 */
	PERMITTED = 0xa0,	/* [0] of RFC 5280 4.2.1.10 */
	EXCLUDED  = 0xa1	/* [1] */
};

/* An element whose contents are the strings given, one after another. */
#define der(tag, ...)  element(tag, STRS(__VA_ARGS__))
#define seq(...)       der(SEQUENCE, __VA_ARGS__)

static Str
element(int tag, size_t count, ...)
{
	size_t mark = used, n = 0, k = 0;
	unsigned char head[2 + sizeof n];
	Str body;
	va_list ap;

	va_start(ap, count);
	body = join_all(count, &ap);
	va_end(ap);
	head[n++] = (unsigned char)tag;
	if (body.n < 128)
		head[n++] = (unsigned char)body.n;
	else {
		while (k < sizeof body.n && body.n >> 8 * k)
			k++;
		head[n++] = (unsigned char)(0x80 | k);
		while (k-- > 0)
			head[n++] = (unsigned char)(body.n >> 8 * k);
	}
	return keep(mark, cat((Str){ head, n }, body));
}

static Str
bits(Str s)
{
	return der(BITS, S("\0"), s);
}

/* A non-negative INTEGER from big-endian bytes (X.690 8.3). */
static Str
integer(Str s)
{
	while (s.n > 1 && s.p[0] == 0)
		s = from(s, 1);
	return der(INTEGER, s.n && s.p[0] & 0x80 ? S("\0") : NONE, s);
}

/* Constant elements: numbers, TRUE, and object identifiers. */
#define ZERO            S("\x02\x01\x00")
#define ONE             S("\x02\x01\x01")
#define TWO             S("\x02\x01\x02")
#define TRUE            S("\x01\x01\xff")
#define EXTENSIONS      S("\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x09\x0e")
#define SUBJECT_ALT     S("\x06\x03\x55\x1d\x11")
#define ACME_IDENTIFIER S("\x06\x08\x2b\x06\x01\x05\x05\x07\x01\x1f")
#define COMMON_NAME     S("\x06\x03\x55\x04\x03")

/*
 * AlgorithmIdentifiers: a sequence of an object identifier and, if the
 * algorithm has one, a parameter (RFC 5480 2.1.1, RFC 3279 2.3.1, RFC 5758
 * 3.2, RFC 4055 5).
 */
#define ID_EC           "\x06\x07\x2a\x86\x48\xce\x3d\x02\x01"
#define P256_KEY        "\x30\x13" ID_EC \
                        "\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07"
#define P384_KEY        "\x30\x10" ID_EC "\x06\x05\x2b\x81\x04\x00\x22"
#define P521_KEY        "\x30\x10" ID_EC "\x06\x05\x2b\x81\x04\x00\x23"
#define ECDSA_SHA256    "\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02"
#define ECDSA_SHA384    "\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x03"
#define PKCS1           "\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01"
#define RSA_KEY         PKCS1 "\x01\x05\x00"
#define RSA_SHA256      PKCS1 "\x0b\x05\x00"

/* One of these; its second byte is the length of the rest. */
static Str
algorithm_of(const char *constant)
{
	return (Str){ (const unsigned char *)constant,
	    2 + (size_t)constant[1] };
}

/*
 * Take the element at the front of `in`: its contents, and the whole with its
 * head. False if that is not DER (X.690 10.1), or longer than `in`.
 */
static bool
der_any(Str *in, int *tag, Str *body, Str *whole)
{
	size_t n, head = 2;

	if (in->n < 2 || (in->p[0] & 0x1f) == 0x1f)
		return false;
	*tag = in->p[0];
	n = in->p[1];
	if (n & 0x80) {
		size_t k = n & 0x7f;

		if (k == 0 || k > 3 || in->n < 2 + k)
			return false;
		for (n = 0; head < 2 + k; head++)
			n = n << 8 | in->p[head];
		if (n < 128 || n >> 8 * (k - 1) == 0)
			return false;
	}
	if (n > in->n - head)
		return false;
	*body = (Str){ in->p + head, n };
	*whole = (Str){ in->p, head + n };
	*in = from(*in, head + n);
	return true;
}

/* The same for an element with this tag; false, and no change, if another. */
static bool
der_next(Str *in, int tag, Str *body)
{
	Str inner, whole, rest = *in;
	int t;

	if (!der_any(&rest, &t, &inner, &whole) || t != tag)
		return false;
	*in = rest;
	*body = inner;
	return true;
}

/* ------------------------------------------------------------ 10. Time -- */

/* The seconds since 1970 of a date and time in UTC. */
static long long
moment(int y, int mon, int d, int h, int min, int s)
{
	/* Years begin in March here, so that a leap day is the last day. */
	long long m = (mon + 9) % 12, n = y - (mon < 3);
	long long day = 365 * n + n / 4 - n / 100 + n / 400 +
	    (153 * m + 2) / 5 + d - 1 - 719468;

	return ((day * 24 + h) * 60 + min) * 60 + s;
}

/* Take n digits off the front as a number, -1 if they are not digits. */
static int
cut_digits(Str *s, size_t n)
{
	unsigned long v;

	if (s->n < n || !number((Str){ s->p, n }, 9999, &v))
		return -1;
	*s = from(*s, n);
	return (int)v;
}

/* Take hh:mm:ss off, as seconds; sep 0: without separators; -1: malformed. */
static long long
time_of_day(Str *s, int sep)
{
	int part[3];

	for (int i = 0; i < 3; i++) {
		if (i && sep && (s->n == 0 || s->p[0] != sep))
			return -1;
		if (i && sep)
			*s = from(*s, 1);
		if ((part[i] = cut_digits(s, 2)) < 0)
			return -1;
	}
	if (part[0] > 23 || part[1] > 59 || part[2] > 60)
		return -1;
	return part[0] * 3600LL + part[1] * 60LL + part[2];
}

/* Read a UTCTime or GeneralizedTime (RFC 5280 4.1.2.5); false: malformed. */
static bool
x509_time(int tag, Str s, long long *t)
{
	int y = cut_digits(&s, tag == UTC_TIME ? 2 : 4);
	int m = cut_digits(&s, 2), d = cut_digits(&s, 2);
	long long seconds = time_of_day(&s, 0);

	if (tag != UTC_TIME && tag != TIME)
		return false;
	if (y < 0 || m < 1 || m > 12 || d < 1 || d > 31 || seconds < 0 ||
	    !is(s, "Z"))
		return false;
	if (tag == UTC_TIME)
		y += y < 50 ? 2000 : 1900;
	*t = moment(y, m, d, 0, 0, 0) + seconds;
	return true;
}

/* Read Sun, 06 Nov 1994 08:49:37 GMT (RFC 9110 5.6.7); false: malformed. */
static bool
http_date(Str s, long long *t)
{
	static const char month[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
	int d, y, m = 0;
	long long seconds;

	cut(&s, ' ');
	d = cut_digits(&s, 2);
	if (d < 1 || d > 31 || s.n < 5 || s.p[0] != ' ')
		return false;
	while (m < 12 && memcmp(month + 3 * m, s.p + 1, 3) != 0)
		m++;
	s = from(s, 5);
	y = cut_digits(&s, 4);
	s = from(s, 1);
	seconds = time_of_day(&s, ':');
	if (m == 12 || y < 0 || seconds < 0 || !is(s, " GMT"))
		return false;
	*t = moment(y, m + 1, d, 0, 0, 0) + seconds;
	return true;
}

/* Read all of s, +hh:mm, -hh:mm or Z, as seconds; false if malformed. */
static bool
time_offset(Str s, long long *t)
{
	int unit, h, m;

	*t = 0;
	if (same_nocase(s, S("Z")))
		return true;
	if (s.n != 6 || (s.p[0] != '+' && s.p[0] != '-') || s.p[3] != ':')
		return false;
	unit = s.p[0] == '-' ? -60 : 60;
	s = from(s, 1);
	h = cut_digits(&s, 2);
	s = from(s, 1);
	m = cut_digits(&s, 2);
	*t = unit * (h * 60LL + m);
	return h >= 0 && h < 24 && m >= 0 && m < 60;
}

/* What follows a fraction of a second, such as ".5" (RFC 3339 5.6). */
static Str
skip_fraction(Str s)
{
	size_t n = 1;

	while (n < s.n && s.p[n] >= '0' && s.p[n] <= '9')
		n++;
	return n > 1 && s.p[0] == '.' ? from(s, n) : s;
}

/*
 * Read 2026-11-24T01:02:03.5+01:00 (RFC 3339 5.6), without the fraction of
 * a second; false: malformed.
 */
static bool
rfc3339(Str s, long long *t)
{
	long long seconds, offset;
	int y, m, d;

	y = cut_digits(&s, 4);
	if (y < 0 || s.n < 7 || s.p[0] != '-' || s.p[3] != '-')
		return false;
	s = from(s, 1);
	m = cut_digits(&s, 2);
	s = from(s, 1);
	d = cut_digits(&s, 2);
	if (m < 1 || m > 12 || d < 1 || d > 31 ||
	    !made_of((Str){ s.p, s.n > 0 }, "Tt "))
		return false;
	s = from(s, 1);
	seconds = time_of_day(&s, ':');
	if (seconds < 0 || !time_offset(skip_fraction(s), &offset))
		return false;
	*t = moment(y, m, d, 0, 0, 0) + seconds - offset;
	return true;
}

/* Old sandboxes refuse system calls that they do not know, such as this. */
static struct timespec
read_clock(clockid_t clock)
{
	struct timespec t;

	if (clock_gettime(clock, &t) != 0)
		die(FAULT, "cannot read the clock: %", why());
	return t;
}

/* Milliseconds on a clock that is never set. */
static long long
now_ms(void)
{
	struct timespec t = read_clock(CLOCK_MONOTONIC);

	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* Seconds since 1970. */
static long long
now_seconds(void)
{
	return read_clock(CLOCK_REALTIME).tv_sec;
}

/* Sleep for ms, even if signals arrive. */
static void
sleep_for(long long ms)
{
	long long end = now_ms() + ms;

	while ((ms = end - now_ms()) > 0)
		poll(NULL, 0, ms < INT_MAX ? (int)ms : INT_MAX);
}

/* A number from 0 to 99. */
static Str
two_digits(int n)
{
	return from(num(100U + (unsigned)n), 1);
}

/* Seconds since 1970 as 2026-11-24T00:00:00Z (RFC 3339 5.6). */
static Str
date(long long t)
{
	int s = (int)(((t % 86400) + 86400) % 86400);
	long long days = (t - s) / 86400;
	int y = 1970 + (int)(days < 0 ? days / 365 - 1 : days / 366), m = 1;

	while (moment(y + 1, 1, 1, 0, 0, 0) <= t)
		y++;
	while (m < 12 && moment(y, m + 1, 1, 0, 0, 0) <= t)
		m++;
	days -= moment(y, m, 1, 0, 0, 0) / 86400;
	return text("%-%-%T%:%:%Z", from(num(10000U + (unsigned)y), 1),
	    two_digits(m), two_digits((int)days + 1), two_digits(s / 3600),
	    two_digits(s / 60 % 60), two_digits(s % 60));
}

static long long deadline;	/* of the step, by now_ms() */

static void
start_clock(void)
{
	deadline = now_ms() + 1000LL * activity.limit;
	alarm(activity.limit);
}

/* The milliseconds until the step's time limit. */
static long long
time_left(void)
{
	return deadline - now_ms();
}

/*
 * A connection that is made early (see connect_early) must not delay what is
 * on standard input. Wait until the other descriptor can be read, if it is
 * not negative, for ms at most; if the input comes first, or the time limit,
 * the attempt is over.
 */
static bool
wait_early(int fd, long long ms)
{
	struct pollfd p[] = { { 0, POLLIN, 0 }, { fd, POLLIN, 0 } };

	if (ms > time_left())
		ms = time_left();
	if (poll(p, 2, ms > 0 ? (int)ms : 0) < 0 && errno == EINTR)
		return true;
	return !p[0].revents && time_left() > 0;
}

/* On a terminal, show what is waited for; NULL clears the line again. */
static void
show_wait(const char *what, long long ms)
{
	if (!isatty(2))
		return;
	write_all(2, S("\r\033[K"));
	if (!what)
		return;
	say_begin();
	line_add(text("%, % s", str(what),
	    num((unsigned long long)(ms + 999) / 1000)));
	line_flush();
}

/*
 * With -B requests are written to files, and the step does not wait: it
 * reports how many ms the CA asks for before the next request.
 */
static bool boxed;
static long long box_pause;

static long long report_time;	/* ms that the last requests may take */

/*
 * How many ms the step can wait and still report what it waited for: a
 * second, or a tenth of its time, is for the message, and up to half of its
 * time for the requests that find out what is missing.
 */
static long long
time_to_wait(void)
{
	long long tenth = activity.limit * 100LL, half = 5 * tenth;

	if (tenth > 1000)
		tenth = 1000;
	return time_left() - tenth -
	    (report_time < half ? report_time : half);
}

/* Wait; false, at once, if the step's time limit would come first. */
static bool
pause_for(const char *what, long long ms)
{
	box_pause = ms;
	if (boxed)
		return true;
	if (ms >= time_to_wait())
		return false;
	doing(LATER, what, "");
	show_wait(what, time_left());
	sleep_for(ms);
	show_wait(NULL, 0);
	return true;
}

/* --------------------------------------------------- 11. Reading files -- */

static bool
is_std(const char *name)
{
	return !name || strcmp(name, "-") == 0;
}

/* For messages. */
static Str
file_name(const char *name)
{
	return is_std(name) ? S("standard input") : str(name);
}

static int
open_input(const char *name)
{
	/* NOLINTNEXTLINE(clang-analyzer-*): then it is not NULL */
	int fd = is_std(name) ? 0 : open(name, O_RDONLY | O_NOCTTY | O_CLOEXEC);

	if (fd < 0)
		die(MISSING, "cannot open %: %", file_name(name), why());
	return fd;
}

/* Read at most n bytes; 0 at the end of the file. */
static size_t
read_some(int fd, void *p, size_t n, const char *name)
{
	ssize_t got;

	do
		got = read(fd, p, n);
	while (got < 0 && errno == EINTR);
	if (got < 0 && errno == EISDIR && is_std(name))
		die(MISSING, "standard input is closed or is a directory");
	if (got < 0)
		die(errno == EISDIR ? MISSING : IO, "cannot read %: %",
		    file_name(name), why());
	return (size_t)got;
}

static void
look_away(Str s)
{
	(void)s;
}

/* All of a file.  look() sees each piece, with all those before it. */
static Str
read_all(int fd, const char *name, void (*look)(Str))
{
	enum { PIECE = 4096 };
	Str s = { heap + used, 0 };
	size_t n;

	do {
		unsigned char *p = alloc(PIECE);

		n = read_some(fd, p, PIECE, name);
		used -= PIECE - n;
		s.n += n;
		if (s.n > INPUT)
			die(BAD, "% is larger than % KiB", file_name(name),
			    num(INPUT >> 10));
		look(s);
	} while (n > 0);
	return s;
}

#define BYTE_ORDER_MARK "\xef\xbb\xbf"	/* RFC 3629 6 */

/* All of a file except a byte order mark; "-" is standard input. */
static Str
read_file_and(const char *name, void (*look)(Str))
{
	int fd = open_input(name);
	Str s = read_all(fd, name, look);

	if (fd > 2)
		close(fd);
	return begins(s, BYTE_ORDER_MARK) ? from(s, 3) : s;
}

static Str
read_file(const char *name)
{
	return read_file_and(name, look_away);
}

/* Is there no such file? */
static bool
is_missing(const char *name)
{
	struct stat st;

	return !is_std(name) && stat(name, &st) != 0 && (errno == ENOENT ||
	    errno == ENOTDIR);
}

/* A file's text; NONE if there is no such file. */
static Str
read_if_there(const char *name)
{
	return is_missing(name) ? NONE : read_file(name);
}

/* --------------------------------------------------- 12. Writing files -- */

/*
 * Where the result goes. It is complete or absent: a file is written under
 * a temporary name in the same directory, synced, and renamed at the end.
 * Only a file that is a mount point is written in place.
 */
static struct {
	const char *file;		/* NULL: standard output */
	const char *base, *temporary;	/* in dir; NULL: not renamed */
	int dir, fd;
	bool key;			/* 0600, and never replaces */
	bool in_place;			/* a file that cannot be replaced */
} out = { NULL, NULL, NULL, -1, 1, false, false };

static void
cannot_create(Str cause)
{
	die(NO_PLACE, "cannot create %: %", str(out.file), cause);
}

/* A descriptor; or -1, with errno. */
static int
open_directory(const char *name)
{
	return open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* The directory part of a path; *base is the name in it. */
static const char *
split_path(const char *path, const char **base)
{
	const char *slash = strrchr(path, '/');

	*base = slash ? slash + 1 : path;
	if (!slash)
		return ".";
	return slash == path ? "/" :
	    c_str((Str){ (const unsigned char *)path, (size_t)(slash - path) });
}

/*
 * Set a file's mode; false if the file does not get the bits `needed`, or
 * keeps one of `forbidden`.  File systems like CIFS refuse a mode, or ignore
 * it without an error, so what the file has decides.
 */
static bool
set_mode(int fd, mode_t mode, mode_t needed, mode_t forbidden)
{
	struct stat st;

	fchmod(fd, mode);
	return fstat(fd, &st) == 0 && (st.st_mode & needed) == needed &&
	    !(st.st_mode & forbidden);
}

/*
 * Give the new file the owner and mode of the old one, if we may set the
 * owner; the file system must not give group or others more rights then.
 */
static void
keep_mode(const struct stat *st)
{
	if (fchown(out.fd, st->st_uid, st->st_gid) == 0 &&
	    !set_mode(out.fd, st->st_mode & 0777, 0, ~st->st_mode & 066))
		cannot_create(S("its file system does not keep the mode of the "
		    "old file"));
}

/* For kernels without getrandom(2), such as Linux 3.10; false, with errno. */
static bool
read_urandom(unsigned char *p, size_t n)
{
	int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	struct stat st;
	ssize_t got = 1;

	if (fd < 0)
		return false;
	errno = ENODEV;
	if (fstat(fd, &st) == 0 && S_ISCHR(st.st_mode))
		while (n > 0 && (got > 0 || (got < 0 && errno == EINTR)))
			if ((got = read(fd, p, n)) > 0) {
				p += got;
				n -= (size_t)got;
			}
	close(fd);
	return n == 0;
}

static void
random_bytes(void *p, size_t n)
{
	if (getentropy(p, n) != 0 &&
	    (errno != ENOSYS || !read_urandom(p, n)))
		die(FAULT, "cannot get random bytes from the system: %",
		    why());
}

/*
 * Create a file that the end of the step removes, unless that is cancelled.
 * A descriptor; or -1, with errno.
 */
static int
create(int dir, const char *name, mode_t mode)
{
	sigset_t old;
	int fd;

	block_signals(&old);
	fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW |
	    O_CLOEXEC, mode);
	if (fd >= 0)
		add_cleanup(remove_file, dir, name);
	sigprocmask(SIG_SETMASK, &old, NULL);
	return fd;
}

static const char *
temporary_name(void)
{
	unsigned char r[8];

	random_bytes(r, sizeof r);
	return c_str(text(".acme-step.%", hex((Str){ r, sizeof r })));
}

/* The same for a file that is renamed later; *name is its temporary name. */
static int
create_temporary(int dir, const char **name, mode_t mode)
{
	*name = temporary_name();
	return create(dir, *name, mode);
}

/*
 * Give a temporary file its name in dir, unless something already has that
 * name (EEXIST); false, with errno.  link() does both at once, and leaves
 * the file both names. On a file system without hard links, a file that
 * appears between fstatat() and renameat() is replaced.
 */
static bool
name_file(int dir, const char *temporary, const char *name)
{
	struct stat st;

	if (linkat(dir, temporary, dir, name, 0) == 0)
		return true;
	if (errno == EEXIST)
		return false;
	if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) == 0) {
		errno = EEXIST;
		return false;
	}
	return errno == ENOENT && renameat(dir, temporary, dir, name) == 0;
}

/* Remove the temporary name, if it is still there; false, with errno. */
static bool
drop_name(int dir, const char *temporary)
{
	return unlinkat(dir, temporary, 0) == 0 || errno == ENOENT;
}

/*
 * Could another user have put this file there to divert our output? Yes if
 * the directory is sticky and others can write to it, as to /tmp, and the
 * file belongs neither to us nor to the directory's owner. Linux can refuse
 * to open such files too (fs.protected_regular).
 */
static bool
is_of_others(const char *file, const struct stat *st)
{
	const char *base;
	struct stat dir;

	return st->st_uid != geteuid() &&
	    stat(split_path(file, &base), &dir) == 0 &&
	    st->st_uid != dir.st_uid && dir.st_mode & S_ISVTX &&
	    dir.st_mode & (S_IWGRP | S_IWOTH);
}

static void
refuse_file_of_others(const char *file, const struct stat *st)
{
	if (is_of_others(file, st))
		cannot_create(text("% belongs to another user, in a directory "
		    "that others can write", str(file)));
}

/*
 * The file that symbolic links lead to, so that it is replaced and not the
 * links; *st is what lstat() reports of it. It is still a link if that
 * leads to something without a path, as those in /proc/self/fd can.
 */
static const char *
follow(const char *file, struct stat *st)
{
	enum { LINKS = 40 };		/* as many as Linux follows */
	const char *base, *next;

	for (int i = 0; i < LINKS; i++, file = next) {
		char *to = (char *)alloc(PATH_MAX);
		ssize_t n;

		if (lstat(file, st) != 0)
			break;
		refuse_file_of_others(file, st);
		if (!S_ISLNK(st->st_mode))
			return file;
		if ((n = readlink(file, to, PATH_MAX - 1)) < 0)
			cannot_create(why());
		to[n] = 0;
		next = to[0] == '/' ? to :
		    c_str(text("%/%", str(split_path(file, &base)), str(to)));
		if (access(next, F_OK) != 0 && access(file, F_OK) == 0)
			return file;
	}
	cannot_create(S("the symbolic link does not lead to a file"));
	return file;
}

/* Is the file standard output, such as /dev/stdout? Then it is written to. */
static bool
is_output(const struct stat *st)
{
	struct stat own;

	return fstat(1, &own) == 0 && own.st_dev == st->st_dev &&
	    own.st_ino == st->st_ino;
}

/* Overwrite and remove a key that was not given its final name. */
static void
remove_key(const struct cleanup *c)
{
	static unsigned char zeros[512];	/* no part of the file */
	struct stat st;
	bool gone = fstat(out.fd, &st) == 0 && lseek(out.fd, 0, SEEK_SET) == 0;

	for (off_t n = 0; gone && n < st.st_size; n += (off_t)sizeof zeros)
		gone = write_all(out.fd, (Str){ zeros, sizeof zeros });
	fsync(out.fd);
	if (ftruncate(out.fd, 0) != 0 || !gone)
		warn_later("cannot overwrite the key in %: %", str(c->p),
		    why());
	remove_file(c);
}

/*
 * Is the file a mount point, as "docker run -v FILE:FILE" makes it? Then no
 * other file can be renamed to it. A hard link to it in its directory fails
 * with EXDEV then, or with EROFS if the directory is read-only.
 */
static bool
is_mount(void)
{
	const char *name = temporary_name();
	size_t n = ncleanup;
	sigset_t old;
	bool linked;

	block_signals(&old);
	/* NOLINTNEXTLINE(clang-analyzer-*): split_path() has set out.base */
	linked = linkat(out.dir, out.base, out.dir, name, 0) == 0;
	if (linked)
		add_cleanup(remove_file, out.dir, name);
	sigprocmask(SIG_SETMASK, &old, NULL);
	if (!linked)
		return errno == EXDEV || errno == EROFS;
	clean_up_to(n);
	return false;
}

/* Open a file that is written in place; a FIFO needs a reader. */
static void
open_in_place(const char *file, int flags)
{
	doing(NO_PLACE, "waiting for a reader to open", file);
	out.fd = open(file, O_WRONLY | O_NOCTTY | O_CLOEXEC | flags);
	if (out.fd < 0)
		cannot_create(why());
}

/* Create the file that is renamed at the end. */
static void
open_temporary(void)
{
	out.fd = create_temporary(out.dir, &out.temporary,
	    out.key ? 0600 : 0666);
	if (out.fd < 0)
		cannot_create(why());
	if (out.key && !set_mode(out.fd, 0600, 0, 077))
		cannot_create(S("its file system would let others read the "
		    "key"));
	if (out.key)
		cleanup[ncleanup - 1].end = remove_key;
}

/* Prepare, before the first request, to write the result to a file. */
static void
out_open(const char *file, bool key)
{
	struct stat st;
	bool old;

	out.file = file;
	out.key = key;
	old = lstat(file, &st) == 0;
	if (!old && errno != ENOENT)
		cannot_create(why());
	if (old && key)
		cannot_create(S("it exists, and keys are never replaced"));
	if (old)
		refuse_file_of_others(file, &st);
	if (old && stat(file, &st) == 0 && is_output(&st))
		return;
	if (old)
		file = follow(file, &st);
	if (old && !S_ISREG(st.st_mode)) {
		open_in_place(file, S_ISLNK(st.st_mode) ? 0 : O_NOFOLLOW);
		return;
	}
	out.dir = open_directory(split_path(file, &out.base));
	if (out.dir < 0)
		cannot_create(why());
	/* NOLINTNEXTLINE(clang-analyzer-*): split_path() has set it */
	if (!*out.base)
		die(NO_PLACE, "cannot create '%': the file name is empty",
		    str(file));
	out.in_place = old && is_mount();
	if (out.in_place) {
		open_in_place(file, O_NOFOLLOW);
		return;
	}
	open_temporary();
	if (old)
		keep_mode(&st);
}

static void
not_written(const char *what)
{
	Str cause = why();

	die(IO, "cannot % %: %", str(what),
	    out.file ? str(out.file) : S("standard output"), cause);
}

/* Sync a file; false, with errno, unless its file system cannot do it. */
static bool
synced(int fd)
{
	return fsync(fd) == 0 || errno == EINVAL || errno == ENOTSUP ||
	    errno == EROFS;
}

/* Give a key its name. From then on it is not removed, even on failure. */
static void
name_key(void)
{
	sigset_t old;
	bool named, alone;

	block_signals(&old);
	named = name_file(out.dir, out.temporary, out.base);
	if (named)
		cancel_cleanup();
	alone = named && drop_name(out.dir, out.temporary);
	sigprocmask(SIG_SETMASK, &old, NULL);
	if (!named && errno == EEXIST)
		cannot_create(S("it exists, and keys are never replaced"));
	if (!named)
		not_written("rename");
	if (!alone)
		die(IO, "the key is in %, but its temporary name % cannot "
		    "be removed: %", str(out.file), str(out.temporary),
		    why());
}

static void
out_rename(void)
{
	if (renameat(out.dir, out.temporary, out.dir, out.base) != 0)
		not_written("rename");
	cancel_cleanup();
}

/* Write the result, all at once. Nothing else writes to it. */
static void
print(Str s)
{
	on_record_pipe = on_record_pipe && out.fd != 1;
	doing(IO, "writing", out.file ? out.file : "standard output");
	if (!write_all(out.fd, s) ||
	    (out.in_place && ftruncate(out.fd, (off_t)s.n) != 0))
		not_written("write");
	if ((out.temporary || out.in_place) && !synced(out.fd))
		not_written("sync");
	/*
	 * A key keeps a descriptor, for remove_key(); NFS reports errors of
	 * writing when any descriptor of the file is closed.
	 */
	if (close(out.key ? dup(out.fd) : out.fd) != 0)
		not_written("close");
	if (!out.temporary)
		return;
	if (out.key)
		name_key();
	else
		out_rename();
	if (!synced(out.dir))
		warn("warning: cannot sync the directory of %: %",
		    str(out.file), why());
}

/* ------------------------------------------------------------- 13. PEM -- */

enum {
	PEM_LINE  = 256,	/* bytes of a BEGIN or END line, RFC 7468 2 */
	PEM_BYTES = 48		/* that we write to a line, in 64 digits */
};

/*
 * A reader of RFC 7468 blocks, fed piece by piece. Files come from editors
 * and systems of all kinds: a byte order mark before a line and white space
 * in it are ignored, and lines can end with CR, LF or both.
 */
struct pem {
	size_t digits, padding;	/* of the block so far; RFC 4648 4 */
	unsigned bits;		/* the last `nbits` are of the next byte */
	int nbits;
	size_t mark;		/* of the heap, where the block begins */
	Str der;		/* the block, decoded, on top of the heap */
	Str label;		/* of its BEGIN line, in label_bytes */
	bool open, bad;		/* in a block; the block is malformed */
	bool part;		/* `buf` continues a line longer than that */
	size_t nbuf;
	unsigned char buf[PEM_LINE], label_bytes[PEM_LINE];
};

/* The only one; each use of it ends with wiping it: it can hold a key. */
static struct pem reader;

static void
pem_begin(struct pem *r)
{
	r->mark = used;
	r->nbuf = 0;
	r->open = r->bad = r->part = false;
}

/* The label of a line that begins with this prefix, NONE for another line. */
static Str
pem_label(Str s, Str prefix)
{
	Str label = from(s, prefix.n), end = S("-----");

	if (!has_prefix(s, prefix) || label.n < end.n ||
	    !same(from(label, label.n - end.n), end))
		return NONE;
	return (Str){ label.p, label.n - end.n };
}

/* The value of a digit of base64 (RFC 4648 4); 64 if it is not a digit. */
static unsigned
base64_value(unsigned char c)
{
	if (c >= 'A' && c <= 'Z')
		return c - (unsigned)'A';
	if (c >= 'a' && c <= 'z')
		return c - (unsigned)'a' + 26;
	if (c >= '0' && c <= '9')
		return c - (unsigned)'0' + 52;
	if (c == '+')
		return 62;
	return c == '/' ? 63 : 64;
}

/* Decode s, in r->buf, which is base64; true if it is malformed. */
static bool
pem_body(struct pem *r, Str s)
{
	size_t n = 0;

	for (size_t i = 0; i < s.n; i++) {
		unsigned value = base64_value(s.p[i]);

		if (s.p[i] <= ' ')
			continue;
		r->digits++;
		r->padding += s.p[i] == '=';
		if (s.p[i] == '=')
			continue;
		if (value > 63 || r->padding) {
			r->bad = true;
			r->open = false;
			return true;
		}
		r->bits = r->bits << 6 | value;
		if ((r->nbits += 6) >= 8)
			r->buf[n++] = (unsigned char)
			    (r->bits >> (r->nbits -= 8));
	}
	r->der = cat(r->der, (Str){ r->buf, n });
	return false;
}

/* Begin a block; true, malformed, if one is open. */
static bool
pem_open(struct pem *r, Str label)
{
	r->bad = r->open;
	r->open = true;
	memcpy(r->label_bytes, label.p, label.n);
	r->label = (Str){ r->label_bytes, label.n };
	used = r->mark;
	r->der = (Str){ heap + used, 0 };
	r->digits = r->padding = 0;
	r->nbits = 0;
	return r->bad;
}

/*
 * End a block: the padding fills its last group of four digits, and no digit
 * is left over (RFC 4648 4).
 */
static bool
pem_close(struct pem *r, Str label)
{
	r->open = false;
	r->bad = !same(label, r->label) || r->digits % 4 != 0 ||
	    r->padding > 2 || r->nbits != 2 * (int)r->padding;
	return true;
}

/* Read a line, or a part of one; true if a block ends, good or bad. */
static bool
pem_line(struct pem *r, Str s)
{
	Str label = NONE;

	if (!r->part) {
		s = trim(from(s, begins(s, BYTE_ORDER_MARK) ? 3 : 0));
		label = pem_label(s, S("-----BEGIN "));
	}
	if (label.n)
		return pem_open(r, label);
	if (r->open && !r->part && begins(s, "-----"))
		return pem_close(r, pem_label(s, S("-----END ")));
	return r->open && pem_body(r, s);
}

/* Read up to the end of a block, good or bad; false at the end of `in`. */
static bool
pem_push(struct pem *r, Str *in)
{
	while (in->n > 0) {
		unsigned char c = in->p[0];
		bool end = c == '\n' || c == '\r', found = false;

		*in = from(*in, 1);
		if (end || r->nbuf == sizeof r->buf) {
			found = pem_line(r, (Str){ r->buf, r->nbuf });
			r->part = !end;
			r->nbuf = 0;
		}
		if (!end)
			r->buf[r->nbuf++] = c;
		if (found)
			return true;
	}
	return false;
}

/*
 * Take the next block, and all before it, off a whole file. False at its
 * end, or if the block is malformed: *bad tells which.
 */
static bool
pem_next(Str *in, Str *label, Str *block, bool *bad)
{
	struct pem *r = &reader;
	Str end = S("\n");	/* the last line may lack it */
	bool have, ok;

	pem_begin(r);
	have = pem_push(r, in) || pem_push(r, &end);
	*bad = r->bad || (!have && r->open);
	ok = have && !r->bad;
	if (ok) {
		*label = cat(NONE, r->label);
		*block = r->der;
	}
	wipe(r, sizeof *r);
	return ok;
}

static Str
pem(Str block, const char *label)
{
	struct list all = text_begin();

	list_add(&all, "", text("-----BEGIN %-----\n", str(label)));
	for (; block.n; block = from(block, PEM_BYTES)) {
		Str part = { block.p, block.n < PEM_BYTES ? block.n :
		    PEM_BYTES };

		list_add(&all, "", text("%\n", base64(part)));
	}
	list_add(&all, "", text("-----END %-----\n", str(label)));
	return list_text(&all);
}

/* ------------------------------------------------------------ 14. Keys -- */

enum {			/* bytes of a key's numbers */
	MIN_MODULUS    = 2048 / 8,
	MAX_MODULUS    = 4096 / 8,
	MAX_PRIME      = MAX_MODULUS / 2,
	MAX_EXPONENT   = 4,		/* RSA's, public */
	MAX_COORDINATE = 384 / 8	/* or private value, of P-384 */
};

/*
 * All that is known of a type of key. The first row is the default of -t.
 * An RSA key of any size that comes from a file has the first of RSA's
 * rows, which differ only in name and size.
 */
static const struct key_type {
	char name[8];			/* as -t has it */
	char alg[6];			/* RFC 7518 3.1 */
	char crv[6];			/* RFC 7518 6.2.1.1; "": RSA */
	unsigned short curve;		/* BearSSL's and TLS's; 0: RSA */
	unsigned short size;		/* bytes of a coordinate or modulus */
	const br_hash_class *hash;	/* for signatures */
	const unsigned char *hash_oid;	/* the same for RSA's; NULL: EC */
	char public[24];		/* algorithm of SubjectPublicKeyInfo */
	char signature[16];		/* X.509's signatureAlgorithm */
} key_types[] = {
	{ "ec256", "ES256", "P-256", BR_EC_secp256r1, 256 / 8,
	    &br_sha256_vtable, NULL, P256_KEY, ECDSA_SHA256 },
	{ "ec384", "ES384", "P-384", BR_EC_secp384r1, 384 / 8,
	    &br_sha384_vtable, NULL, P384_KEY, ECDSA_SHA384 },
	{ "rsa2048", "RS256", "", 0, 2048 / 8,
	    &br_sha256_vtable, BR_HASH_OID_SHA256, RSA_KEY, RSA_SHA256 },
	{ "rsa3072", "RS256", "", 0, 3072 / 8,
	    &br_sha256_vtable, BR_HASH_OID_SHA256, RSA_KEY, RSA_SHA256 },
	{ "rsa4096", "RS256", "", 0, 4096 / 8,
	    &br_sha256_vtable, BR_HASH_OID_SHA256, RSA_KEY, RSA_SHA256 },
};

struct key {
	const struct key_type *type;
	br_ec_private_key ec;
	br_ec_public_key ec_public;
	br_rsa_private_key rsa;
	uint32_t exponent;		/* RSA's, public */
	unsigned char secret[BR_RSA_KBUF_PRIV_SIZE(MAX_MODULUS * 8)];
	/* RSA: the modulus; EC: the point */
	unsigned char public[BR_RSA_KBUF_PUB_SIZE(MAX_MODULUS * 8)];
	size_t npublic;
	br_skey_decoder_context decoder;
};

static struct key account_key, other_key;

/*
 * BearSSL's code for X25519, P-256, P-384 and P-521: portable, and constant
 * in time if multiplication is. P-256 has code of its own, which takes half
 * the time of the generic one.
 */
static const br_ec_impl *const curves = &br_ec_all_m31;

static Str
hash(const br_hash_class *h, Str s)
{
	size_t n = h->desc >> BR_HASHDESC_OUT_OFF & BR_HASHDESC_OUT_MASK;
	unsigned char *p = alloc(n);
	br_hash_compat_context c;

	h->init(&c.vtable);
	h->update(&c.vtable, s.p, s.n);
	h->out(&c.vtable, p);
	return (Str){ p, n };
}

static Str
sha256(Str s)
{
	return hash(&br_sha256_vtable, s);
}

static Str
hmac_sha256(Str key, Str s)
{
	unsigned char *o = alloc(br_sha256_SIZE);
	br_hmac_key_context k;
	br_hmac_context c;

	br_hmac_key_init(&k, &br_sha256_vtable, key.p, key.n);
	br_hmac_init(&c, &k, 0);
	br_hmac_update(&c, s.p, s.n);
	br_hmac_out(&c, o);
	wipe(&k, sizeof k);
	wipe(&c, sizeof c);
	wipe_stack();
	return (Str){ o, br_sha256_SIZE };
}

/* Compute the public point from the private value; false if that fails. */
static bool
ec_complete(struct key *k)
{
	k->npublic = br_ec_compute_pub(curves, &k->ec_public, k->public,
	    &k->ec);
	return k->npublic == 1U + 2U * k->type->size;
}

/*
 * Take over the public half of an RSA key. It is not derived from the
 * private one: BearSSL's code for that fails for 4096 bits, and for primes
 * that are not 3 modulo 4.
 */
static void
rsa_public(struct key *k, Str n, Str e)
{
	k->npublic = n.n;
	memcpy(k->public, n.p, n.n);
	for (k->exponent = 0; e.n; e = from(e, 1))
		k->exponent = k->exponent << 8 | e.p[0];
}

/* The public exponent of RSA, big-endian, without leading zeros. */
static Str
exponent(const struct key *k)
{
	unsigned char *p = alloc(MAX_EXPONENT), *end = p + MAX_EXPONENT;

	for (int shift = 24; shift >= 0; shift -= 8)
		*p++ = (unsigned char)(k->exponent >> shift);
	for (p -= MAX_EXPONENT; p < end - 1 && !*p; p++)
		continue;
	return (Str){ p, (size_t)(end - p) };
}

/* Do the halves of an RSA key match? One verifies what the other signs. */
static bool
rsa_works(const struct key *k)
{
	Str e = exponent(k), h = sha256(S("a trial"));
	br_rsa_public_key public = { (unsigned char *)k->public, k->npublic,
	    (unsigned char *)e.p, e.n };
	unsigned char signature[MAX_MODULUS], got[br_sha256_SIZE];

	return br_rsa_i31_pkcs1_sign(BR_HASH_OID_SHA256, h.p, h.n, &k->rsa,
	        signature) &&
	    br_rsa_i31_pkcs1_vrfy(signature, k->npublic, BR_HASH_OID_SHA256,
	        sizeof got, &public, got) &&
	    same(h, (Str){ got, sizeof got });
}

/* Make a new private key. */
static void
key_make(struct key *k, const struct key_type *type)
{
	br_hmac_drbg_context rng;
	br_rsa_public_key public;
	unsigned char seed[32];
	bool ok;

	random_bytes(seed, sizeof seed);
	br_hmac_drbg_init(&rng, &br_sha256_vtable, seed, sizeof seed);
	k->type = type;
	if (type->curve)
		ok = br_ec_keygen(&rng.vtable, curves, &k->ec, k->secret,
		    type->curve) != 0;
	else {
		ok = br_rsa_i31_keygen(&rng.vtable, &k->rsa, k->secret,
		    &public, k->public, type->size * 8U, EXPONENT);
		k->npublic = type->size;
		k->exponent = EXPONENT;
	}
	if (!ok || (type->curve && !ec_complete(k)))
		die(FAULT, "cannot make a key");
	wipe(seed, sizeof seed);
	wipe(&rng, sizeof rng);
	wipe_stack();
}

/*
 * Do an RSAPrivateKey's numbers (RFC 8017 A.1.2) have possible sizes? Its
 * public half is taken over.
 */
static bool
rsa_fits(Str s, struct key *k)
{
	static const unsigned short max[] = {
		1, MAX_MODULUS, MAX_EXPONENT, MAX_MODULUS,	/* 0 n e d */
		MAX_PRIME, MAX_PRIME, MAX_PRIME, MAX_PRIME, MAX_PRIME
	};
	Str n[COUNT(max)];

	for (size_t i = 0; i < COUNT(max); i++) {
		if (!der_next(&s, INTEGER, &n[i]))
			return false;
		while (n[i].n && n[i].p[0] == 0)
			n[i] = from(n[i], 1);
		if (n[i].n > max[i])
			return false;
	}
	rsa_public(k, n[1], n[2]);
	return s.n == 0;
}

/*
 * Are the sizes in a key possible? BearSSL 0.6's decoder trusts them. The
 * key is in PKCS #8 (RFC 5208 5), an RSAPrivateKey or an ECPrivateKey
 * (RFC 5915 3); one that is `wrapped` was in PKCS #8.
 */
static bool
key_fits(struct key *k, Str block, bool wrapped)
{
	Str all, s, n, whole, rest = block;
	int tag;

	if (!der_next(&rest, SEQUENCE, &all) || rest.n)
		return false;
	s = all;
	if (!der_next(&s, INTEGER, &n) || n.n != 1 ||
	    !der_any(&s, &tag, &n, &whole))
		return false;
	if (tag == INTEGER)
		return rsa_fits(all, k);
	if (tag == SEQUENCE && !wrapped)
		return der_next(&s, OCTETS, &n) && key_fits(k, n, true);
	return tag == OCTETS && n.n <= MAX_COORDINATE;
}

/* Take over what the decoder found; NONE if it is usable, else why not. */
static Str
key_accept(struct key *k)
{
	const br_ec_private_key *ec = br_skey_decoder_get_ec(&k->decoder);
	const br_rsa_private_key *rsa = br_skey_decoder_get_rsa(&k->decoder);
	const struct key_type *type = key_types;
	const struct key_type *end = type + COUNT(key_types);

	if (!ec && !rsa)
		return S("it cannot be decoded");
	while (type < end && type->curve != (ec ? ec->curve : 0))
		type++;
	if (type == end)
		return S("its curve is not supported");
	k->type = type;
	if (rsa) {
		k->rsa = *rsa;
		return rsa->n_bitlen < MIN_MODULUS * 8 ||
		    rsa->n_bitlen > MAX_MODULUS * 8 ?
		    S("RSA keys must have 2048 to 4096 bits") : NONE;
	}
	if (ec->xlen > type->size)
		return S("its private value is too large for its curve");
	memcpy(k->secret + type->size - ec->xlen, ec->x, ec->xlen);
	k->ec = (br_ec_private_key){ ec->curve, k->secret, type->size };
	return NONE;
}

/* Is an EC key's private value in its curve's range (SEC 1 3.2.1)? */
static bool
in_range(const struct key *k)
{
	size_t n;
	const unsigned char *order = curves->order(k->type->curve, &n);
	unsigned any = 0;

	for (size_t i = 0; i < k->ec.xlen; i++)
		any |= k->ec.x[i];
	return any && n == k->ec.xlen && memcmp(k->ec.x, order, n) < 0;
}

#define ED25519 "\x30\x05\x06\x03\x2b\x65\x70"	/* RFC 8410 3 */

/*
 * Warn of a key that others can read, if our user can change that: not if
 * the file is another user's, or on a read-only file system, as secrets
 * mounted into a container are.
 */
static void
warn_if_shared(const char *name)
{
	struct stat st;
	struct statvfs fs;

	if (!is_std(name) && stat(name, &st) == 0 && S_ISREG(st.st_mode) &&
	    st.st_mode & 077 && (geteuid() == 0 || geteuid() == st.st_uid) &&
	    (statvfs(name, &fs) != 0 || !(fs.f_flag & ST_RDONLY)))
		warn("warning: % is accessible to other users; run chmod 600 %",
		    str(name), str(name));
}

/* Decode a private key's DER; the file's name is for messages. */
static void
key_decode(struct key *k, Str whole, Str name)
{
	Str fault;
	bool valid;

	if (contains(whole, S(ED25519)))
		die(BAD, "% holds an Ed25519 key; use an ec256, ec384 "
		    "or RSA key", name);
	if (!key_fits(k, whole, false))
		die(BAD, "the key in % is malformed or of an "
		    "unsupported type", name);
	br_skey_decoder_init(&k->decoder);
	br_skey_decoder_push(&k->decoder, whole.p, whole.n);
	fault = key_accept(k);
	if (fault.n)
		die(BAD, "cannot use the key in %: %", name, fault);
	if (k->type->curve)
		valid = in_range(k) && ec_complete(k);
	else
		valid = rsa_works(k);
	if (!valid)
		die(BAD, "the key in % is invalid: its values are "
		    "out of range or do not match", name);
}

/* Read the first private key in a PEM file, in PKCS #8 or in its own form. */
static void
key_read(struct key *k, const char *name)
{
	size_t mark = used;
	Str all = read_file(name), rest = all, label = NONE, block, place;
	bool bad;

	warn_if_shared(name);
	while (pem_next(&rest, &label, &block, &bad)) {
		if (!contains(label, S("PRIVATE KEY")))
			continue;
		if (begins(label, "ENCRYPTED"))
			break;
		key_decode(k, block, file_name(name));
		wipe(heap + mark, peak - mark);
		wipe_stack();
		used = mark;
		return;
	}
	/* OpenSSL's own form has headers, which are malformed here. */
	if (contains(bad ? all : label, S("ENCRYPTED")))
		die(BAD, "% is encrypted: decrypt it first", file_name(name));
	place = cat(file_name(name), bad ? S(": malformed PEM") : NONE);
	die(BAD, "no private key in %", place);
}

/* As a JWK: exactly the members that RFC 7638 3.2 hashes, in its order. */
static Str
jwk(const struct key *k)
{
	size_t n = k->type->size;
	Str x = { k->public + 1, n }, y = { k->public + 1 + n, n };

	if (!k->type->curve)
		return text("{\"e\":\"%\",\"kty\":\"RSA\",\"n\":\"%\"}",
		    b64(exponent(k)), b64((Str){ k->public, k->npublic }));
	return text("{\"crv\":\"%\",\"kty\":\"EC\",\"x\":\"%\",\"y\":\"%\"}",
	    str(k->type->crv), b64(x), b64(y));
}

/* The SHA-256 thumbprint of its JWK (RFC 7638 3.2). */
static Str
thumbprint(const struct key *k)
{
	return b64(sha256(jwk(k)));
}

/* SubjectPublicKeyInfo (RFC 5280 4.1.2.7, RFC 5480 2, RFC 8017 A.1). */
static Str
public_key(const struct key *k)
{
	Str p = { k->public, k->npublic };

	return seq(algorithm_of(k->type->public), bits(k->type->curve ? p :
	    seq(integer(p), integer(exponent(k)))));
}

/* RSAPrivateKey (RFC 8017 A.1.2). */
static Str
rsa_private(const struct key *k)
{
	const br_rsa_private_key *r = &k->rsa;
	unsigned char *d = alloc(MAX_MODULUS);
	size_t n = br_rsa_i31_compute_privexp(d, r, k->exponent);

	if (n == 0)
		die(FAULT, "cannot make a key");
	return seq(ZERO,
	    integer((Str){ k->public, k->npublic }),
	    integer(exponent(k)),
	    integer((Str){ d, n }),
	    integer((Str){ r->p, r->plen }), integer((Str){ r->q, r->qlen }),
	    integer((Str){ r->dp, r->dplen }),
	    integer((Str){ r->dq, r->dqlen }),
	    integer((Str){ r->iq, r->iqlen }));
}

/* ECPrivateKey (RFC 5915 3), its public half included. */
static Str
ec_private(const struct key *k)
{
	return seq(ONE,
	    der(OCTETS, (Str){ k->ec.x, k->ec.xlen }),
	    der(EC_PUBLIC, bits((Str){ k->public, k->npublic })));
}

/* A private key's file: PKCS #8 (RFC 5208 5). */
static Str
key_pem(const struct key *k)
{
	return pem(seq(ZERO, algorithm_of(k->type->public),
	    der(OCTETS, k->type->curve ? ec_private(k) : rsa_private(k))),
	    "PRIVATE KEY");
}

/*
 * Sign. ECDSA's two numbers are one after another for JWS (RFC 7518 3.4),
 * or a DER sequence for X.509 (RFC 3279 2.2.3).
 */
static Str
sign(const struct key *k, Str s, bool asn1)
{
	Str h = hash(k->type->hash, s);
	unsigned char *o = alloc(MAX_MODULUS);
	br_ecdsa_sign ec = asn1 ? br_ecdsa_i31_sign_asn1 :
	    br_ecdsa_i31_sign_raw;
	size_t n = k->npublic;

	if (k->type->curve)
		n = ec(curves, k->type->hash, h.p, &k->ec, o);
	else if (!br_rsa_i31_pkcs1_sign(k->type->hash_oid, h.p, h.n,
	    &k->rsa, o))
		n = 0;
	if (n == 0)
		die(FAULT, "cannot sign");
	wipe_stack();
	used -= MAX_MODULUS - n;
	return (Str){ o, n };
}

/* ---------------------------------------------- 15. Addresses and URLs -- */

/*
 * An identifier (RFC 8555 9.7.7, RFC 8738 3). Its value is canonical: a
 * name in lower case, with "*." before it if it is a wildcard, or an address
 * in the form of ip_text().
 */
struct identifier {
	Str type, value;
};

static bool
is_ip(Str type)
{
	return is(type, "ip");
}

/* The 4 or 16 bytes of an IP address in text, else NONE. */
static Str
ip_bytes(Str s)
{
	unsigned char *p = alloc(16);
	const char *address;

	if (!s.n || s.n >= INET6_ADDRSTRLEN || memchr(s.p, 0, s.n))
		return NONE;
	address = c_str(s);
	if (inet_pton(AF_INET, address, p) == 1)
		return (Str){ p, 4 };
	if (inet_pton(AF_INET6, address, p) == 1)
		return (Str){ p, 16 };
	return NONE;
}

/* A number below 65536 in hexadecimal, without leading zeros. */
static Str
hex_number(unsigned n)
{
	unsigned char b[2] = { (unsigned char)(n >> 8), (unsigned char)n };
	Str s = hex((Str){ b, 2 });

	while (s.n > 1 && s.p[0] == '0')
		s = from(s, 1);
	return s;
}

/* The text of an address's bytes, in its canonical form (RFC 5952 4). */
static Str
ip_text(Str b)
{
	unsigned part[8];
	size_t i, at = 8, most = 1, zeros;
	Str s = NONE;

	if (b.n == 4)
		return text("%.%.%.%", num(b.p[0]), num(b.p[1]), num(b.p[2]),
		    num(b.p[3]));
	for (i = 0; i < 8; i++)
		part[i] = b.p[2 * i] * 256U + b.p[2 * i + 1];
	for (i = 0; i < 8; i++) {	/* "::" is the longest run of zeros */
		for (zeros = 0; i + zeros < 8 && !part[i + zeros]; zeros++)
			continue;
		if (zeros > most) {
			most = zeros;
			at = i;
		}
	}
	for (i = 0; i < 8; i++)
		if (i == at) {
			s = text("%::", s);
			i += most - 1;
		} else
			s = cat(NONE, s, i && (i != at + most) ? S(":") :
			    NONE, hex_number(part[i]));
	return s;
}

/* The parts of a URL (RFC 3986 3). */
struct url {
	Str authority;			/* host:port as written */
	Str host, port, path;		/* the path with its query */
	Str origin;			/* https://host:port as written */
};

/*
 * Take a host off the front of s, with the colon that follows it; an IPv6
 * address is in brackets (RFC 3986 3.2.2). NONE if it is malformed.
 */
static Str
take_host(Str *s)
{
	Str host;

	if (!begins(*s, "["))
		return cut(s, ':');
	*s = from(*s, 1);
	host = cut(s, ']');
	if (ip_bytes(host).n != 16 || (s->n && s->p[0] != ':'))
		return NONE;
	*s = from(*s, 1);
	return host;
}

/*
 * Read HOST[:PORT], all of s; without a port *port is not changed. A host
 * cannot begin with a dash: the command of -P would take it for an option.
 */
static bool
host_port(Str s, Str *host, Str *port)
{
	unsigned long n;

	*host = take_host(&s);
	if (s.n)
		*port = s;
	return host->n <= HOSTNAME && !begins(*host, "-") &&
	    (made_of(*host, ALPHA DIGIT "-._") || ip_bytes(*host).n) &&
	    port->n <= PORT && number(*port, MAX_PORT, &n) && n > 0;
}

/*
 * Read a URL; false unless it begins with the scheme, such as "https://",
 * and has no forbidden character. Without a port it has the one given.
 */
static bool
url_of(Str s, Str scheme, Str port, struct url *u)
{
	Str rest;
	size_t n = 0;

	for (size_t i = 0; i < s.n; i++)
		if (s.p[i] <= ' ' || s.p[i] >= 0x7f || strchr("#\"<>\\^`{|}",
		    s.p[i]))
			return false;
	if (s.n > WORD || s.n < scheme.n ||
	    !same_nocase((Str){ s.p, scheme.n }, scheme))
		return false;
	rest = from(s, scheme.n);
	while (n < rest.n && rest.p[n] != '/' && rest.p[n] != '?')
		n++;
	u->authority = (Str){ rest.p, n };
	u->path = from(rest, n);
	u->origin = (Str){ s.p, scheme.n + n };
	u->port = port;
	return host_port(u->authority, &u->host, &u->port);
}

/* Read a URL of the CA; only https, as RFC 8555 6.1 requires. */
static bool
url_read(Str s, struct url *u)
{
	return url_of(s, S("https://"), S("443"), u);
}

/* Do two https URLs have the same origin (RFC 6454 4)? */
static bool
same_origin(Str a, Str b)
{
	struct url u, v;
	unsigned long m, n;
	Str ip;

	if (!url_read(a, &u) || !url_read(b, &v))
		return false;
	ip = ip_bytes(u.host);
	return (same_nocase(u.host, v.host) ||
	    (ip.n && same(ip, ip_bytes(v.host)))) &&
	    number(u.port, MAX_PORT, &m) && number(v.port, MAX_PORT, &n) &&
	    m == n;
}

/* The origin of a URL as the URL has it, for messages. */
static Str
origin(Str url)
{
	struct url u;

	return url_read(url, &u) ? u.origin : url;
}

static bool
is_url(Str s)
{
	struct url u;
	size_t mark = used;
	bool ok = url_read(s, &u);

	used = mark;
	return ok;
}

/* ---------------------------------------------------- 16. Certificates -- */

/* The parts of a certificate (RFC 5280 4.1) that we use, all within der. */
struct cert {
	Str der, serial, issuer, subject, public_key;
	Str extensions;			/* Extension, one after another */
	Str alt_names;			/* GeneralNames, or NONE */
	Str key_id;			/* authority key identifier, or NONE */
	bool v3;			/* its version is 3 */
	bool issues;			/* cA of basicConstraints is true */
	long long not_before, not_after;
};

/* Read notBefore and notAfter (RFC 5280 4.1.2.5). */
static bool
cert_validity(Str s, struct cert *c)
{
	Str body, whole;
	int tag;

	return der_any(&s, &tag, &body, &whole) &&
	    x509_time(tag, body, &c->not_before) &&
	    der_any(&s, &tag, &body, &whole) &&
	    x509_time(tag, body, &c->not_after) && s.n == 0;
}

/* The extensions that we use (RFC 5280 4.2.1): the contents of their OIDs. */
#define ALT_NAMES        S("\x55\x1d\x11")
#define BASIC            S("\x55\x1d\x13")
#define NAME_CONSTRAINTS S("\x55\x1d\x1e")
#define AUTHORITY_KEY_ID S("\x55\x1d\x23")
#define EXTENDED_USAGE   S("\x55\x1d\x25")

struct extension {
	Str id, value;
	bool critical;
};

/* Take the next extension off a list; false at its end, or if malformed. */
static bool
next_extension(Str *list, struct extension *e)
{
	Str s, critical = NONE;

	if (!der_next(list, SEQUENCE, &s) || !der_next(&s, OID, &e->id))
		return false;
	der_next(&s, BOOLEAN, &critical);
	e->critical = critical.n && critical.p[0];
	return der_next(&s, OCTETS, &e->value) && s.n == 0;
}

static bool
find_extension(const struct cert *c, Str id, struct extension *e)
{
	Str list = c->extensions;

	while (next_extension(&list, e))
		if (same(e->id, id))
			return true;
	return false;
}

/* The contents of an extension's sequence; NONE if absent or malformed. */
static Str
extension_list(const struct cert *c, Str id)
{
	struct extension e;
	Str s;

	return find_extension(c, id, &e) && der_next(&e.value, SEQUENCE, &s) &&
	    e.value.n == 0 ? s : NONE;
}

/* Does a certificate have an extension twice, against RFC 5280 4.2? */
static bool
has_twice(const struct cert *c)
{
	Str list = c->extensions, rest;
	struct extension e, other;

	while (next_extension(&list, &e))
		for (rest = list; next_extension(&rest, &other); )
			if (same(e.id, other.id))
				return true;
	return false;
}

/* Can a GeneralName have this tag (RFC 5280 4.2.1.6)? */
static bool
is_name_tag(int tag)
{
	Str tags = S("\xa0\x81\x82\xa3\xa4\xa5\x86\x87\x88");

	return memchr(tags.p, tag, tags.n) != NULL;
}

/* Is this a list of well-formed GeneralNames? */
static bool
are_names(Str list)
{
	Str body, whole;
	int tag;

	while (list.n > 0)
		if (!der_any(&list, &tag, &body, &whole) ||
		    !is_name_tag(tag) ||
		    (tag == IP_NAME && body.n != 4 && body.n != 16))
			return false;
	return true;
}

/*
 * Read the extensions that we use; false if the list is malformed. A
 * subjectAltName that is malformed, or not the only one, counts as absent:
 * not all of its names can be known.
 */
static bool
cert_extensions(Str list, struct cert *c)
{
	struct extension e;
	Str s, issues;

	c->extensions = list;
	while (list.n > 0)
		if (!next_extension(&list, &e))
			return false;
	s = extension_list(c, ALT_NAMES);
	if (s.n && are_names(s) && !has_twice(c))
		c->alt_names = s;
	s = extension_list(c, BASIC);
	c->issues = der_next(&s, BOOLEAN, &issues) && issues.n == 1 &&
	    issues.p[0];
	s = extension_list(c, AUTHORITY_KEY_ID);
	der_next(&s, KEY_ID, &c->key_id);
	return true;
}

/* Read a certificate's DER; false if it is malformed. */
static bool
cert_read(Str whole, struct cert *c)
{
	Str rest = whole, outer, s, skip, list;
	int tag;

	*c = (struct cert){ .der = whole };
	if (!der_next(&rest, SEQUENCE, &outer) || rest.n ||
	    !der_next(&outer, SEQUENCE, &s))
		return false;
	c->v3 = der_next(&s, VERSION_0, &skip) && same(skip, TWO);
	if (!der_next(&s, INTEGER, &c->serial) ||
	    !der_next(&s, SEQUENCE, &skip) ||
	    !der_any(&s, &tag, &skip, &c->issuer) ||
	    !der_next(&s, SEQUENCE, &skip) || !cert_validity(skip, c) ||
	    !der_any(&s, &tag, &skip, &c->subject) ||
	    !der_any(&s, &tag, &skip, &c->public_key))
		return false;
	while (s.n > 0) {
		if (!der_any(&s, &tag, &skip, &list))
			return false;
		if (tag == EXTS && (c->extensions.n ||
		    !der_next(&skip, SEQUENCE, &list) || skip.n ||
		    !cert_extensions(list, c)))
			return false;
	}
	return true;
}

/*
 * Take the next name off a list of GeneralNames. A name that is neither a
 * DNS name nor an address gets the type "other": an e-mail address must not
 * pass for one of them.
 */
static bool
cert_name(Str *list, struct identifier *name)
{
	Str body, whole;
	int tag;

	if (!der_any(list, &tag, &body, &whole))
		return false;
	name->type = tag == DNS_NAME ? S("dns") : S("other");
	name->value = lower(body);
	if (tag == IP_NAME && (body.n == 4 || body.n == 16))
		*name = (struct identifier){ S("ip"), ip_text(body) };
	return true;
}

/* The last common name of a distinguished name, or NONE. */
static Str
common_name(Str dn)
{
	Str list, set, pair, id, value, whole, cn = NONE;
	int tag;

	if (!der_next(&dn, SEQUENCE, &list))
		return NONE;
	while (der_next(&list, SET, &set))
		while (der_next(&set, SEQUENCE, &pair))
			if (der_next(&pair, OID, &id) &&
			    der_any(&pair, &tag, &value, &whole) &&
			    same(id, from(COMMON_NAME, 2)))
				cn = value;
	return cn;
}

/* -------------------------------------------- 17. Certificate requests -- */

/* One subject alternative name (RFC 5280 4.2.1.6). */
static Str
general_name(const struct identifier *id)
{
	return is_ip(id->type) ? der(IP_NAME, ip_bytes(id->value)) :
	    der(DNS_NAME, id->value);
}

/*
 * PKCS #10 (RFC 2986 4.1):
 *
 *	SEQUENCE { version 0, subject, SubjectPublicKeyInfo,
 *	           [0] { extensionRequest { subjectAltName } } }
 *
 * The subject is empty, except for a common name if one is given: a CA
 * reads the names from subjectAltName (RFC 8555 7.4), which is critical if
 * the subject is empty (RFC 5280 4.2.1.6).  `names` are GeneralNames.
 */
static Str
csr_der(const struct key *k, Str names, Str cn)
{
	Str subject = cn.n ? seq(der(SET, seq(COMMON_NAME, der(UTF8, cn)))) :
	    seq(NONE);
	Str info = seq(
	    ZERO,
	    subject,
	    public_key(k),
	    der(ATTRS,
	        seq(EXTENSIONS,
	            der(SET, seq(seq(SUBJECT_ALT,
	                cn.n ? NONE : TRUE,
	                der(OCTETS, seq(names))))))));

	return seq(info, algorithm_of(k->type->signature),
	    bits(sign(k, info, true)));
}

/* Does an RSA signature over a hash verify by an RSAPublicKey? */
static bool
rsa_verifies(Str public, const unsigned char *hash_oid, Str h, Str signature)
{
	unsigned char got[br_sha256_SIZE];
	br_rsa_public_key key;
	Str list, n, e;

	if (!der_next(&public, SEQUENCE, &list) ||
	    !der_next(&list, INTEGER, &n) || !der_next(&list, INTEGER, &e))
		return false;
	key = (br_rsa_public_key){ (unsigned char *)n.p, n.n,
	    (unsigned char *)e.p, e.n };
	return br_rsa_i31_pkcs1_vrfy(signature.p, signature.n, hash_oid, h.n,
	    &key, got) && same(h, (Str){ got, h.n });
}

/*
 * Does a signature (a BIT STRING's contents) over s verify by the key of a
 * SubjectPublicKeyInfo? One that is not of a type of ours passes.
 */
static bool
verifies(Str public, Str algorithm, Str s, Str signature)
{
	const struct key_type *t = key_types;
	br_ec_public_key point;
	Str all, body, type, key, h;
	int tag;

	if (!der_next(&public, SEQUENCE, &all) ||
	    !der_any(&all, &tag, &body, &type) || !der_next(&all, BITS, &key))
		return false;
	while (!same(type, algorithm_of(t->public)) ||
	    !same(algorithm, algorithm_of(t->signature)))
		if (++t == key_types + COUNT(key_types))
			return true;
	h = hash(t->hash, s);
	key = from(key, 1);
	signature = from(signature, 1);
	if (!t->curve)
		return signature.n > MAX_MODULUS ||
		    rsa_verifies(key, t->hash_oid, h, signature);
	point = (br_ec_public_key){ t->curve, (unsigned char *)key.p, key.n };
	return br_ecdsa_i31_vrfy_asn1(curves, h.p, h.n, &point, signature.p,
	    signature.n);
}

/*
 * Read the extensions that the attributes of a CSR ask for (RFC 2985 5.4.2);
 * false if they are malformed.
 */
static bool
csr_attributes(Str list, struct cert *c)
{
	Str attribute, id, values, extensions;

	while (list.n > 0) {
		if (!der_next(&list, SEQUENCE, &attribute) ||
		    !der_next(&attribute, OID, &id) ||
		    !der_next(&attribute, SET, &values))
			return false;
		if (same(id, from(EXTENSIONS, 2)) &&
		    (!der_next(&values, SEQUENCE, &extensions) ||
		    !cert_extensions(extensions, c)))
			return false;
	}
	return true;
}

/*
 * Read a CSR (RFC 2986 4) as far as it has what a certificate has: subject,
 * key, names. *genuine: its signature verifies. False if it is malformed.
 */
static bool
csr_read(Str whole, struct cert *c, bool *genuine)
{
	Str rest = whole, outer, info, signed_part, skip, algorithm, signature;
	int tag;

	*c = (struct cert){ .der = whole };
	if (!der_next(&rest, SEQUENCE, &outer) || rest.n ||
	    !der_any(&outer, &tag, &info, &signed_part) || tag != SEQUENCE ||
	    !der_any(&outer, &tag, &skip, &algorithm) || tag != SEQUENCE ||
	    !der_next(&outer, BITS, &signature) || outer.n ||
	    !der_next(&info, INTEGER, &skip) ||
	    !der_any(&info, &tag, &skip, &c->subject) || tag != SEQUENCE ||
	    !der_any(&info, &tag, &skip, &c->public_key) || tag != SEQUENCE)
		return false;
	*genuine = verifies(c->public_key, algorithm, signed_part, signature);
	return !der_next(&info, ATTRS, &skip) || csr_attributes(skip, c);
}

/* --------------------------------------------------- 18. Trust anchors -- */

/* The file of trust anchors; NULL: the two that are built in. */
static const char *anchor_file;
static br_x509_trust_anchor anchor[ANCHORS];
static struct cert anchor_cert[ANCHORS]; /* built in: only a subject */
static size_t nanchor;

/* Where systems have their file of trust anchors. */
static const char bundle[][52] = {
	"/etc/ssl/certs/ca-certificates.crt",	/* Debian, Alpine, Arch */
	"/etc/pki/tls/certs/ca-bundle.crt",	/* Fedora, RHEL */
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
	"/etc/ssl/ca-bundle.pem",		/* openSUSE */
	"/etc/ssl/cert.pem",			/* BSD, musl systems */
};

/*
 * The roots of Let's Encrypt: the modulus of ISRG Root X1 (RSA), and the
 * point of ISRG Root X2 (P-384).
 */
static const unsigned char isrg_x1[] = {
	0xad, 0xe8, 0x24, 0x73, 0xf4, 0x14, 0x37, 0xf3, 0x9b, 0x9e, 0x2b,
	0x57, 0x28, 0x1c, 0x87, 0xbe, 0xdc, 0xb7, 0xdf, 0x38, 0x90, 0x8c,
	0x6e, 0x3c, 0xe6, 0x57, 0xa0, 0x78, 0xf7, 0x75, 0xc2, 0xa2, 0xfe,
	0xf5, 0x6a, 0x6e, 0xf6, 0x00, 0x4f, 0x28, 0xdb, 0xde, 0x68, 0x86,
	0x6c, 0x44, 0x93, 0xb6, 0xb1, 0x63, 0xfd, 0x14, 0x12, 0x6b, 0xbf,
	0x1f, 0xd2, 0xea, 0x31, 0x9b, 0x21, 0x7e, 0xd1, 0x33, 0x3c, 0xba,
	0x48, 0xf5, 0xdd, 0x79, 0xdf, 0xb3, 0xb8, 0xff, 0x12, 0xf1, 0x21,
	0x9a, 0x4b, 0xc1, 0x8a, 0x86, 0x71, 0x69, 0x4a, 0x66, 0x66, 0x6c,
	0x8f, 0x7e, 0x3c, 0x70, 0xbf, 0xad, 0x29, 0x22, 0x06, 0xf3, 0xe4,
	0xc0, 0xe6, 0x80, 0xae, 0xe2, 0x4b, 0x8f, 0xb7, 0x99, 0x7e, 0x94,
	0x03, 0x9f, 0xd3, 0x47, 0x97, 0x7c, 0x99, 0x48, 0x23, 0x53, 0xe8,
	0x38, 0xae, 0x4f, 0x0a, 0x6f, 0x83, 0x2e, 0xd1, 0x49, 0x57, 0x8c,
	0x80, 0x74, 0xb6, 0xda, 0x2f, 0xd0, 0x38, 0x8d, 0x7b, 0x03, 0x70,
	0x21, 0x1b, 0x75, 0xf2, 0x30, 0x3c, 0xfa, 0x8f, 0xae, 0xdd, 0xda,
	0x63, 0xab, 0xeb, 0x16, 0x4f, 0xc2, 0x8e, 0x11, 0x4b, 0x7e, 0xcf,
	0x0b, 0xe8, 0xff, 0xb5, 0x77, 0x2e, 0xf4, 0xb2, 0x7b, 0x4a, 0xe0,
	0x4c, 0x12, 0x25, 0x0c, 0x70, 0x8d, 0x03, 0x29, 0xa0, 0xe1, 0x53,
	0x24, 0xec, 0x13, 0xd9, 0xee, 0x19, 0xbf, 0x10, 0xb3, 0x4a, 0x8c,
	0x3f, 0x89, 0xa3, 0x61, 0x51, 0xde, 0xac, 0x87, 0x07, 0x94, 0xf4,
	0x63, 0x71, 0xec, 0x2e, 0xe2, 0x6f, 0x5b, 0x98, 0x81, 0xe1, 0x89,
	0x5c, 0x34, 0x79, 0x6c, 0x76, 0xef, 0x3b, 0x90, 0x62, 0x79, 0xe6,
	0xdb, 0xa4, 0x9a, 0x2f, 0x26, 0xc5, 0xd0, 0x10, 0xe1, 0x0e, 0xde,
	0xd9, 0x10, 0x8e, 0x16, 0xfb, 0xb7, 0xf7, 0xa8, 0xf7, 0xc7, 0xe5,
	0x02, 0x07, 0x98, 0x8f, 0x36, 0x08, 0x95, 0xe7, 0xe2, 0x37, 0x96,
	0x0d, 0x36, 0x75, 0x9e, 0xfb, 0x0e, 0x72, 0xb1, 0x1d, 0x9b, 0xbc,
	0x03, 0xf9, 0x49, 0x05, 0xd8, 0x81, 0xdd, 0x05, 0xb4, 0x2a, 0xd6,
	0x41, 0xe9, 0xac, 0x01, 0x76, 0x95, 0x0a, 0x0f, 0xd8, 0xdf, 0xd5,
	0xbd, 0x12, 0x1f, 0x35, 0x2f, 0x28, 0x17, 0x6c, 0xd2, 0x98, 0xc1,
	0xa8, 0x09, 0x64, 0x77, 0x6e, 0x47, 0x37, 0xba, 0xce, 0xac, 0x59,
	0x5e, 0x68, 0x9d, 0x7f, 0x72, 0xd6, 0x89, 0xc5, 0x06, 0x41, 0x29,
	0x3e, 0x59, 0x3e, 0xdd, 0x26, 0xf5, 0x24, 0xc9, 0x11, 0xa7, 0x5a,
	0xa3, 0x4c, 0x40, 0x1f, 0x46, 0xa1, 0x99, 0xb5, 0xa7, 0x3a, 0x51,
	0x6e, 0x86, 0x3b, 0x9e, 0x7d, 0x72, 0xa7, 0x12, 0x05, 0x78, 0x59,
	0xed, 0x3e, 0x51, 0x78, 0x15, 0x0b, 0x03, 0x8f, 0x8d, 0xd0, 0x2f,
	0x05, 0xb2, 0x3e, 0x7b, 0x4a, 0x1c, 0x4b, 0x73, 0x05, 0x12, 0xfc,
	0xc6, 0xea, 0xe0, 0x50, 0x13, 0x7c, 0x43, 0x93, 0x74, 0xb3, 0xca,
	0x74, 0xe7, 0x8e, 0x1f, 0x01, 0x08, 0xd0, 0x30, 0xd4, 0x5b, 0x71,
	0x36, 0xb4, 0x07, 0xba, 0xc1, 0x30, 0x30, 0x5c, 0x48, 0xb7, 0x82,
	0x3b, 0x98, 0xa6, 0x7d, 0x60, 0x8a, 0xa2, 0xa3, 0x29, 0x82, 0xcc,
	0xba, 0xbd, 0x83, 0x04, 0x1b, 0xa2, 0x83, 0x03, 0x41, 0xa1, 0xd6,
	0x05, 0xf1, 0x1b, 0xc2, 0xb6, 0xf0, 0xa8, 0x7c, 0x86, 0x3b, 0x46,
	0xa8, 0x48, 0x2a, 0x88, 0xdc, 0x76, 0x9a, 0x76, 0xbf, 0x1f, 0x6a,
	0xa5, 0x3d, 0x19, 0x8f, 0xeb, 0x38, 0xf3, 0x64, 0xde, 0xc8, 0x2b,
	0x0d, 0x0a, 0x28, 0xff, 0xf7, 0xdb, 0xe2, 0x15, 0x42, 0xd4, 0x22,
	0xd0, 0x27, 0x5d, 0xe1, 0x79, 0xfe, 0x18, 0xe7, 0x70, 0x88, 0xad,
	0x4e, 0xe6, 0xd9, 0x8b, 0x3a, 0xc6, 0xdd, 0x27, 0x51, 0x6e, 0xff,
	0xbc, 0x64, 0xf5, 0x33, 0x43, 0x4f,
};
static const unsigned char isrg_x2[] = {
	0x04, 0xcd, 0x9b, 0xd5, 0x9f, 0x80, 0x83, 0x0a, 0xec, 0x09, 0x4a,
	0xf3, 0x16, 0x4a, 0x3e, 0x5c, 0xcf, 0x77, 0xac, 0xde, 0x67, 0x05,
	0x0d, 0x1d, 0x07, 0xb6, 0xdc, 0x16, 0xfb, 0x5a, 0x8b, 0x14, 0xdb,
	0xe2, 0x71, 0x60, 0xc4, 0xba, 0x45, 0x95, 0x11, 0x89, 0x8e, 0xea,
	0x06, 0xdf, 0xf7, 0x2a, 0x16, 0x1c, 0xa4, 0xb9, 0xc5, 0xc5, 0x32,
	0xe0, 0x03, 0xe0, 0x1e, 0x82, 0x18, 0x38, 0x8b, 0xd7, 0x45, 0xd8,
	0x0a, 0x6a, 0x6e, 0xe6, 0x00, 0x77, 0xfb, 0x02, 0x51, 0x7d, 0x22,
	0xd8, 0x0a, 0x6e, 0x9a, 0x5b, 0x77, 0xdf, 0xf0, 0xfa, 0x41, 0xec,
	0x39, 0xdc, 0x75, 0xca, 0x68, 0x07, 0x0c, 0x1f, 0xea,
};

static void
add_anchor(const struct cert *c, unsigned flags, const br_x509_pkey *key)
{
	if (nanchor == ANCHORS)
		die(FAULT, "more than % trust anchors match the server's chain",
		    num(ANCHORS));
	anchor_cert[nanchor] = *c;
	anchor[nanchor++] = (br_x509_trust_anchor){
	    { (unsigned char *)c->subject.p, c->subject.n }, flags, *key };
}

/* Their names up to the common name: C=US, O=Internet ..., CN= */
#define ISRG_NAME \
    "\x30\x4f\x31\x0b\x30\x09\x06\x03\x55\x04\x06\x13\x02" "US" \
    "\x31\x29\x30\x27\x06\x03\x55\x04\x0a\x13\x20" \
    "Internet Security Research Group" \
    "\x31\x15\x30\x13\x06\x03\x55\x04\x03\x13\x0c"

static void
built_in_anchors(void)
{
	br_x509_pkey rsa = { BR_KEYTYPE_RSA, { .rsa = {
	    (unsigned char *)isrg_x1, sizeof isrg_x1,
	    (unsigned char *)"\1\0\1", 3 } } };
	br_x509_pkey ec = { BR_KEYTYPE_EC, { .ec = {
	    BR_EC_secp384r1, (unsigned char *)isrg_x2, sizeof isrg_x2 } } };
	struct cert x1 = { .subject = S(ISRG_NAME "ISRG Root X1") };
	struct cert x2 = { .subject = S(ISRG_NAME "ISRG Root X2") };

	add_anchor(&x1, BR_X509_TA_CA, &rsa);
	add_anchor(&x2, BR_X509_TA_CA, &ec);
}

/* The curve of an AlgorithmIdentifier; 0 for RSA, -1 if not supported. */
static int
curve_of(Str algorithm)
{
	for (size_t i = 0; i < COUNT(key_types); i++)
		if (same(algorithm, algorithm_of(key_types[i].public)))
			return key_types[i].curve;
	return same(algorithm, S(P521_KEY)) ? BR_EC_secp521r1 : -1;
}

/*
 * A SubjectPublicKeyInfo (RFC 5280 4.1.2.7) in BearSSL's form, pointing into
 * the certificate; false if it is of a type that BearSSL does not support.
 */
static bool
key_in(Str spki, br_x509_pkey *key)
{
	Str s, algorithm, public, skip, n, e;
	int tag, curve;

	if (!der_next(&spki, SEQUENCE, &s) ||
	    !der_any(&s, &tag, &skip, &algorithm) ||
	    !der_next(&s, BITS, &public) || public.n < 2)
		return false;
	public = from(public, 1);
	curve = curve_of(algorithm);
	if (curve) {
		*key = (br_x509_pkey){ BR_KEYTYPE_EC, { .ec = { curve,
		    (unsigned char *)public.p, public.n } } };
		return curve > 0;
	}
	if (!der_next(&public, SEQUENCE, &s) || !der_next(&s, INTEGER, &n) ||
	    !der_next(&s, INTEGER, &e))
		return false;
	*key = (br_x509_pkey){ BR_KEYTYPE_RSA, { .rsa = {
	    (unsigned char *)n.p, n.n, (unsigned char *)e.p, e.n } } };
	return true;
}

/*
 * Make a certificate of the file an anchor, if its key is usable, and if no
 * extension, such as its name constraints, is in it twice.
 */
static bool
decode_anchor(const struct cert *c)
{
	br_x509_pkey key;

	if (!key_in(c->public_key, &key) || has_twice(c))
		return false;
	add_anchor(c, c->issues ? BR_X509_TA_CA : 0, &key);
	return true;
}

/*
 * Can any of the n certificates of a server's chain need this anchor? An
 * anchor that is not a CA must be the server's certificate itself: BearSSL
 * compares only name and key, so that the anchor's owner could make a
 * certificate for any host.
 */
static bool
is_needed(const struct cert *a, const struct cert *certs, size_t n)
{
	if (!a->issues)
		return n > 0 && same(a->der, certs[0].der);
	for (size_t i = 0; i < n; i++)
		if (same(a->subject, certs[i].issuer) ||
		    same(a->subject, certs[i].subject))
			return true;
	return false;
}

/* Read a block of the file of anchors; false if it is not a certificate. */
static bool
read_anchor(struct pem *r, const struct cert *certs, size_t n)
{
	struct cert c;
	bool good = !r->bad && r->der.n <= CERT && cert_read(r->der, &c);

	if (!good || !is_needed(&c, certs, n) || !decode_anchor(&c))
		used = r->mark;
	r->mark = used;
	return good;
}

/*
 * Read the file of anchors. It can have 150, and a chain of n certificates
 * needs few: only those are kept whose name is in the chain. Without a
 * chain, read up to the first certificate; false if there is none.
 */
static bool
read_anchors(const struct cert *certs, size_t n)
{
	struct pem *r = &reader;
	unsigned char buf[4096];
	int fd = open_input(anchor_file);
	bool any = false;
	Str in;

	pem_begin(r);
	while ((n || !any) &&
	    (in.n = read_some(fd, buf, sizeof buf, anchor_file)) > 0) {
		in.p = buf;
		while (pem_push(r, &in))
			any |= read_anchor(r, certs, n);
	}
	close(fd);
	wipe(r, sizeof *r);	/* the file can have a key in it, too */
	wipe(buf, sizeof buf);
	return any;
}

/* Use the system's first file that has a certificate, if there is one. */
static void
find_bundle(void)
{
	for (size_t i = 0; i < COUNT(bundle); i++) {
		struct stat st;

		anchor_file = bundle[i];
		if (access(anchor_file, R_OK) == 0 &&
		    stat(anchor_file, &st) == 0 && S_ISREG(st.st_mode) &&
		    read_anchors(NULL, 0))
			return;
	}
	anchor_file = NULL;
}

/*
 * Choose the file of anchors, by the argument of -C or NULL, and check before
 * any request that it has a certificate.
 */
static void
find_anchors(const char *name)
{
	Str file = variable("SSL_CERT_FILE");

	if (name && strcmp(name, "builtin") == 0)
		return;
	if (name && is_std(name))
		usage("trust anchors cannot come from standard input; use "
		    "-C FILE");
	if (name)
		anchor_file = name;
	else if (file.n)
		anchor_file = c_str(file);
	if (!anchor_file)
		find_bundle();
	else if (!read_anchors(NULL, 0))
		die(BAD, "no certificate in %", str(anchor_file));
}

/* ------------------------------------------------ 19. Name constraints -- */

/* Is s made of labels, with single dots between? No other name matches. */
static bool
is_labels(Str s)
{
	return made_of(s, ALPHA DIGIT "-._") && s.n <= HOSTNAME &&
	    s.p[0] != '.' && s.p[s.n - 1] != '.' && !contains(s, S(".."));
}

/* A wildcard is all of a dNSName's first label (RFC 9525 6.3). */
static bool
is_wildcard(Str name)
{
	return begins(name, "*.");
}

static bool
is_dns_name(Str name)
{
	return is_labels(from(name, is_wildcard(name) ? 2 : 0));
}

/* Does a dNSName match a host name? */
static bool
names_host(Str name, Str host)
{
	if (is_wildcard(name) && cut(&host, '.').n)
		name = from(name, 2);
	return same_nocase(name, host);
}

/*
 * Name constraints (RFC 5280 4.2.1.10); those of DNS names and addresses are
 * applied. A base that begins with a dot is in no standard, but in use: it
 * permits what is below it, and excludes that and the name itself.
 */
struct constraints {
	Str permitted, excluded;	/* GeneralSubtree, one after another */
};

static bool
is_dns_base(Str base)
{
	return base.n == 0 || is_labels(from(base, begins(base, ".")));
}

/* Is a base an address and a mask, in which all ones come first? */
static bool
is_ip_base(Str base)
{
	bool end = false;

	for (size_t i = base.n / 2; i < base.n; i++)
		for (int bit = 0x80; bit; bit >>= 1) {
			if (base.p[i] & bit && end)
				return false;
			end = !(base.p[i] & bit);
		}
	return base.n == 8 || base.n == 32;
}

/* Take the next subtree off a list; false at its end, or if malformed. */
static bool
next_subtree(Str *list, int *tag, Str *base)
{
	Str s, whole;

	return der_next(list, SEQUENCE, &s) &&
	    der_any(&s, tag, base, &whole) && s.n == 0;
}

/* Is this a list of well-formed subtrees, all of known kinds? */
static bool
are_subtrees(Str list)
{
	Str base;
	int tag;

	while (list.n > 0)
		if (!next_subtree(&list, &tag, &base) || !is_name_tag(tag) ||
		    (tag == DNS_NAME && !is_dns_base(base)) ||
		    (tag == IP_NAME && !is_ip_base(base)))
			return false;
	return true;
}

/* Read a CA's constraints, empty if it has none; false if malformed. */
static bool
read_constraints(const struct cert *c, struct constraints *k)
{
	struct extension e;
	Str s;

	*k = (struct constraints){ NONE, NONE };
	if (!find_extension(c, NAME_CONSTRAINTS, &e))
		return true;
	if (!der_next(&e.value, SEQUENCE, &s) || e.value.n)
		return false;
	der_next(&s, PERMITTED, &k->permitted);
	der_next(&s, EXCLUDED, &k->excluded);
	return s.n == 0 && are_subtrees(k->permitted) &&
	    are_subtrees(k->excluded);
}

static bool
ip_within(Str ip, Str base)
{
	if (base.n != 2 * ip.n)
		return false;
	for (size_t i = 0; i < ip.n; i++)
		if ((ip.p[i] ^ base.p[i]) & base.p[ip.n + i])
			return false;
	return true;
}

/* Is every name that a dNSName can match within a base? */
static bool
dns_within(Str name, Str base)
{
	bool below = begins(base, ".");
	size_t dot;

	base = from(base, below);
	if (!is_dns_name(name))
		return false;
	if (base.n == 0 || base.n >= name.n)
		return base.n == 0 || (!below && same_nocase(name, base));
	dot = name.n - base.n - 1;
	return name.p[dot] == '.' && same_nocase(from(name, dot + 1), base);
}

/* Can a dNSName match a name within a base? A malformed one might. */
static bool
dns_touches(Str name, Str base)
{
	Str parent;

	base = parent = from(base, begins(base, "."));
	cut(&parent, '.');
	return !is_dns_name(name) || dns_within(name, base) ||
	    (is_wildcard(name) && same_nocase(from(name, 2), parent));
}

/*
 * Do constraints allow a name: is it in a permitted subtree, if there are
 * any of its kind, and in none that is excluded (RFC 5280 6.1.3 b and c)?
 */
static bool
allows(const struct constraints *k, int kind, Str name)
{
	bool (*within)(Str, Str) = kind == IP_NAME ? ip_within : dns_within;
	bool (*touches)(Str, Str) = kind == IP_NAME ? ip_within : dns_touches;
	bool restricted = false, permitted = false;
	Str subtrees, base;
	int tag;

	for (subtrees = k->permitted; next_subtree(&subtrees, &tag, &base); )
		if (tag == kind) {
			restricted = true;
			permitted |= within(name, base);
		}
	for (subtrees = k->excluded; next_subtree(&subtrees, &tag, &base); )
		if (tag == kind && touches(name, base))
			return false;
	return permitted || !restricted;
}

/* The first name of a certificate that constraints forbid, or NONE. */
static Str
forbidden_name(const struct constraints *k, const struct cert *c)
{
	Str list = c->alt_names, rest, body, whole;
	struct identifier name;
	int tag;

	for (rest = list; der_any(&rest, &tag, &body, &whole); list = rest)
		if ((tag == DNS_NAME || tag == IP_NAME) &&
		    !allows(k, tag, body) && cert_name(&list, &name))
			return text("% %", name.type, name.value);
	return NONE;
}

/* ------------------------------------------------------ 20. Validation -- */

/*
 * BearSSL's X.509 engine needs its anchors before it sees the chain, and
 * checks less than it should. So this engine, around it, collects the
 * server's chain, reads the anchors for it, lets BearSSL validate it, and
 * applies further rules to the path that BearSSL found.
 */
static struct {
	const br_x509_class *vtable;
	br_x509_minimal_context inner;
	const char *name;		/* of the server, for BearSSL */
	Str ip;				/* or its address's bytes, for us */
	Str der[CERTS];
	struct cert cert[CERTS];
	size_t n;
	size_t lost;			/* certificates over a limit */
	Str fault;			/* by our own rules, or NONE */
	bool any;			/* nothing is checked: for respond -c */
	br_x509_pkey key;		/* then the server's, unchecked */
} chain;

static void
chain_start(const br_x509_class **self, const char *name)
{
	(void)self;
	chain.name = chain.ip.n ? NULL : name;
	chain.n = chain.lost = 0;
	chain.fault = NONE;
}

static void
chain_start_cert(const br_x509_class **self, uint32_t length)
{
	(void)self;
	if (chain.n == CERTS || length > CERT)
		chain.lost++;
	else
		chain.der[chain.n] = NONE;
}

static void
chain_append(const br_x509_class **self, const unsigned char *p, size_t n)
{
	(void)self;
	if (!chain.lost)
		chain.der[chain.n] = cat(chain.der[chain.n], (Str){ p, n });
}

static void
chain_end_cert(const br_x509_class **self)
{
	(void)self;
	if (!chain.lost)
		chain.n++;
}

/*
 * Validate the chain with some of the anchors: 0, or BearSSL's error.  *n is
 * the number of certificates on the path, which ends with one that an anchor
 * issued, or with the server's if that is an anchor; the rest is ignored.
 */
static unsigned
chain_validate(br_x509_minimal_context *x, const br_x509_trust_anchor *a,
    size_t na, size_t *n)
{
	const br_x509_class **v = &x->vtable;
	long long now = now_seconds();

	br_x509_minimal_init(x, &br_sha256_vtable, a, na);
	/* BearSSL's own clock can be one of 32 bits; day 0 is in year 0. */
	br_x509_minimal_set_time(x, (uint32_t)(now / 86400 + 719528),
	    (uint32_t)(now % 86400));
	br_x509_minimal_set_rsa(x, br_rsa_i31_pkcs1_vrfy);
	br_x509_minimal_set_ecdsa(x, curves, br_ecdsa_i31_vrfy_asn1);
	br_x509_minimal_set_hash(x, br_sha256_ID, &br_sha256_vtable);
	br_x509_minimal_set_hash(x, br_sha384_ID, &br_sha384_vtable);
	br_x509_minimal_set_hash(x, br_sha512_ID, &br_sha512_vtable);
	br_x509_minimal_set_minrsa(x, MIN_MODULUS);
	(*v)->start_chain(v, chain.name);
	/* get_pkey() returns a key once the path has reached an anchor. */
	for (*n = 0; *n < chain.n && !(*v)->get_pkey(v, NULL); ++*n) {
		(*v)->start_cert(v, (uint32_t)chain.der[*n].n);
		(*v)->append(v, chain.der[*n].p, chain.der[*n].n);
		(*v)->end_cert(v);
	}
	return (*v)->end_chain(v);
}

/* Is a GeneralName the URL's host, an address or a name? */
static bool
matches_host(int tag, Str name)
{
	if (chain.ip.n)
		return tag == IP_NAME && same(name, chain.ip);
	return tag == DNS_NAME && is_dns_name(name) &&
	    names_host(name, str(chain.name));
}

static bool
has_host(const struct cert *c)
{
	Str list = c->alt_names, body, whole;
	int tag;

	while (der_any(&list, &tag, &body, &whole))
		if (matches_host(tag, body))
			return true;
	return false;
}

/*
 * May a certificate be used by a TLS server (RFC 5280 4.2.1.12)? In a CA's
 * certificate the same extension restricts those that the CA issues, as in
 * other TLS clients.
 */
static bool
is_for_servers(const struct cert *c)
{
	struct extension e;
	Str list, id;

	if (!find_extension(c, EXTENDED_USAGE, &e))
		return true;
	if (der_next(&e.value, SEQUENCE, &list))
		while (der_next(&list, OID, &id))
			if (is(id, "\x2b\x06\x01\x05\x05\x07\x03\x01"))
				return true;
	return false;
}

/*
 * How the first n certificates of the path break the name constraints of
 * the CA above them, or NONE.  A certificate that a CA issued to itself is
 * exempt, unless it is the server's (RFC 5280 6.1.3 b and c).
 */
static Str
constraints_fault(const struct cert *ca, size_t n)
{
	struct constraints k;
	Str name;

	if (!read_constraints(ca, &k))
		return S("a CA in its chain has malformed name constraints");
	for (size_t i = 0; i < n; i++) {
		const struct cert *c = &chain.cert[i];

		if (i && same(c->issuer, c->subject))
			continue;
		name = forbidden_name(&k, c);
		if (name.n)
			return text("its name is outside the name "
			    "constraints of its CA: %", brief(name));
	}
	return NONE;
}

/* Is a certificate a trust anchor, by its name and key? */
static bool
is_anchor(const struct cert *c)
{
	for (size_t i = 0; i < nanchor; i++)
		if (same(c->subject, anchor_cert[i].subject) &&
		    same(c->public_key, anchor_cert[i].public_key))
			return true;
	return false;
}

/*
 * Does anchor i have name constraints, and did it issue the last certificate
 * of the path? Others can have the same name: the signature decides.
 */
static bool
constrains(size_t i, size_t n)
{
	br_x509_minimal_context x;
	struct extension e;

	return same(anchor_cert[i].subject, chain.cert[n - 1].issuer) &&
	    find_extension(&anchor_cert[i], NAME_CONSTRAINTS, &e) &&
	    chain_validate(&x, &anchor[i], 1, &n) == 0;
}

/* What is wrong with any certificate of the path, or NONE. */
static Str
cert_fault(const struct cert *c)
{
	struct extension e;

	if (!c->v3)
		return S("is not X.509 version 3");
	if (has_twice(c))
		return S("has an extension twice");
	if (!c->alt_names.n && find_extension(c, ALT_NAMES, &e))
		return S("has a malformed subjectAltName");
	if (!is_for_servers(c))
		return S("is not for TLS servers (extended key usage)");
	return NONE;
}

/* What is wrong with the server's own certificate, or NONE. */
static Str
server_fault(const struct cert *c)
{
	if (!c->alt_names.n)
		return S("its certificate has no subjectAltName");
	if (!has_host(c))
		return S("its certificate is for another name");
	if (c->issues && !is_anchor(c))
		return S("its certificate is a CA certificate");
	return NONE;
}

/* What is wrong with a path of n certificates by our own rules, or NONE. */
static Str
path_fault(size_t n)
{
	Str fault;

	for (size_t i = 0; i < n; i++) {
		fault = cert_fault(&chain.cert[i]);
		if (fault.n)
			return text("% %", i ? S("a CA certificate in its "
			    "chain") : S("its certificate"), fault);
	}
	fault = server_fault(&chain.cert[0]);
	for (size_t i = 1; i < n && !fault.n; i++)
		fault = constraints_fault(&chain.cert[i], i);
	for (size_t i = 0; i < nanchor && !fault.n; i++)
		if (constrains(i, n))
			fault = constraints_fault(&anchor_cert[i], n);
	return fault;
}

/* Use the server's certificate unchecked; 0, or BearSSL's error. */
static unsigned
chain_take(void)
{
	if (chain.n == 0 || !cert_read(chain.der[0], &chain.cert[0]))
		return BR_ERR_X509_UNEXPECTED;
	return key_in(chain.cert[0].public_key, &chain.key) ? 0 :
	    BR_ERR_X509_UNSUPPORTED;
}

/* 0 if the chain is trusted, else BearSSL's error: see chain_fault(). */
static unsigned
chain_end(const br_x509_class **self)
{
	unsigned err;
	size_t n;

	(void)self;
	if (chain.lost)
		return BR_ERR_X509_LIMIT_EXCEEDED;
	if (chain.any)
		return chain_take();
	for (size_t i = 0; i < chain.n; i++)
		if (!cert_read(chain.der[i], &chain.cert[i])) {
			chain.fault = S("a certificate in its chain is "
			    "malformed");
			return BR_ERR_X509_UNEXPECTED;
		}
	nanchor = 0;
	if (anchor_file)
		read_anchors(chain.cert, chain.n);
	else
		built_in_anchors();
	err = chain_validate(&chain.inner, anchor, nanchor, &n);
	if (err == 0)
		chain.fault = path_fault(n);
	return chain.fault.n ? BR_ERR_X509_NOT_TRUSTED : err;
}

static const br_x509_pkey *
chain_key(const br_x509_class *const *self, unsigned *usages)
{
	const br_x509_class *const *v = &chain.inner.vtable;

	(void)self;
	if (!chain.any)
		return (*v)->get_pkey(v, usages);
	if (usages)
		*usages = BR_KEYTYPE_KEYX | BR_KEYTYPE_SIGN;
	return &chain.key;
}

static const br_x509_class chain_vtable = {
	sizeof chain, chain_start, chain_start_cert, chain_append,
	chain_end_cert, chain_end, chain_key
};

/* Of the critical extensions that BearSSL refuses, one has a workaround. */
static Str
critical_fault(void)
{
	struct extension e;

	for (size_t i = 1; i < chain.n; i++)
		if (find_extension(&chain.cert[i], NAME_CONSTRAINTS, &e) &&
		    e.critical)
			return S("a CA in its chain has critical name "
			    "constraints, which are not supported; make that "
			    "CA a trust anchor (-C)");
	return S("a certificate in its chain has a critical extension that "
	    "is not supported");
}

/* A certificate is out of date, or the clock is wrong. */
static Str
time_fault(void)
{
	long long now = now_seconds();

	if (now < RELEASED)
		return text("the clock here is wrong (it shows %); set it",
		    date(now));
	for (const struct cert *c = chain.cert; c < chain.cert + chain.n; c++) {
		if (now < c->not_before)
			return text("its certificate is not valid before % "
			    "(the clock here shows %)", date(c->not_before),
			    date(now));
		if (now > c->not_after)
			return text("its certificate expired at % (the clock "
			    "here shows %)", date(c->not_after), date(now));
	}
	return S("its certificate is out of date");
}

/* Is this error of BearSSL one of the server's chain? */
static bool
is_chain_error(int err)
{
	return (err >= BR_ERR_X509_INVALID_VALUE &&
	    err <= BR_ERR_X509_NOT_TRUSTED) || err == BR_ERR_WRONG_KEY_USAGE;
}

/* BearSSL's errors whose message does not depend on the chain. */
static const struct {
	int error;
	const char *words;
} chain_faults[] = {
	{ BR_ERR_X509_EMPTY_CHAIN, "it sent no certificate" },
	{ BR_ERR_X509_UNSUPPORTED, "a certificate in its chain has a key or "
	    "a signature of an unsupported type" },
	{ BR_ERR_X509_LIMIT_EXCEEDED, "a certificate in its chain has a key "
	    "or a signature of more than 4096 bits" },
	{ BR_ERR_X509_WRONG_KEY_TYPE, "a signature in its chain is not of "
	    "the type of its issuer's key" },
	{ BR_ERR_X509_BAD_SIGNATURE, "a signature in its chain is wrong" },
	{ BR_ERR_X509_DN_MISMATCH, "a certificate in its chain is not "
	    "followed by its issuer's certificate" },
	{ BR_ERR_X509_BAD_SERVER_NAME, "its certificate is for another name" },
	{ BR_ERR_X509_NOT_CA, "a certificate in its chain was issued by a "
	    "certificate that is not a CA's, or under too many CAs" },
	{ BR_ERR_X509_FORBIDDEN_KEY_USAGE, "a CA in its chain may not issue "
	    "certificates (key usage)" },
	{ BR_ERR_WRONG_KEY_USAGE, "its certificate may not be used for TLS "
	    "(key usage)" },
	{ BR_ERR_X509_WEAK_PUBLIC_KEY, "a certificate in its chain has an RSA "
	    "key of less than 2048 bits" },
};

/* Why the server's chain was refused, by BearSSL's error. */
static Str
chain_fault(int err)
{
	Str file = anchor_file ? str(anchor_file) : S("the built-in roots");

	if (chain.fault.n)
		return chain.fault;
	if (chain.lost)
		return S("its chain has too many or too large certificates");
	if (err == BR_ERR_X509_EXPIRED)
		return time_fault();
	if (err == BR_ERR_X509_CRITICAL_EXTENSION)
		return critical_fault();
	if (err == BR_ERR_X509_NOT_TRUSTED)
		return text("its certificate does not chain to a trust anchor "
		    "in %; see -C", file);
	for (size_t i = 0; i < COUNT(chain_faults); i++)
		if (err == chain_faults[i].error)
			return str(chain_faults[i].words);
	return text("a certificate in its chain is malformed (BearSSL error "
	    "%)", num((unsigned)err));
}

/* ------------------------------------------------------------- 21. TLS -- */

/*
 * The only section that uses BearSSL's TLS.  For a connection to a CA it has
 * five calls: tls_open(), tls_write(), tls_read(), tls_end() and tls_close();
 * for a server at which respond -c looks, tls_open_any() and
 * tls_has_protocol(); for a peer that validates tls-alpn-01, tls_accept() and
 * tls_serve().
 */
static struct {
	br_ssl_client_context client;
	unsigned char buffer[BR_SSL_BUFSIZE_BIDI];
	int fd;
	int error;		/* BearSSL's, once TLS has ended */
	size_t returned;	/* bytes, by the last tls_read() */
} tls;

#define ACME_TLS "acme-tls/1"	/* the protocol of RFC 8737 6.2 */

/*
 * Prepare an engine for TLS 1.2 with the suites of RFC 9325 4.2 and RFC 7905
 * 2, and no others.
 */
static void
tls_engine(br_ssl_engine_context *e, void *buffer, size_t size, int duplex)
{
	static const uint16_t suites[] = {
		BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
		BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
		BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
		BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
		BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	};
	unsigned char seed[32];

	br_ssl_engine_set_versions(e, BR_TLS12, BR_TLS12);
	br_ssl_engine_add_flags(e, BR_OPT_NO_RENEGOTIATION);
	br_ssl_engine_set_suites(e, suites, COUNT(suites));
	br_ssl_engine_set_hash(e, br_sha256_ID, &br_sha256_vtable);
	br_ssl_engine_set_hash(e, br_sha384_ID, &br_sha384_vtable);
	br_ssl_engine_set_hash(e, br_sha512_ID, &br_sha512_vtable);
	br_ssl_engine_set_prf_sha256(e, &br_tls12_sha256_prf);
	br_ssl_engine_set_prf_sha384(e, &br_tls12_sha384_prf);
	br_ssl_engine_set_ec(e, curves);
	br_ssl_engine_set_ecdsa(e, br_ecdsa_i31_vrfy_asn1);
	br_ssl_engine_set_rsavrfy(e, br_rsa_i31_pkcs1_vrfy);
	br_ssl_engine_set_gcm(e, &br_sslrec_in_gcm_vtable,
	    &br_sslrec_out_gcm_vtable);
	br_ssl_engine_set_aes_ctr(e, &br_aes_ct_ctr_vtable);
	br_ssl_engine_set_ghash(e, br_ghash_ctmul);
	br_ssl_engine_set_chapol(e, &br_sslrec_in_chapol_vtable,
	    &br_sslrec_out_chapol_vtable);
	br_ssl_engine_set_chacha20(e, br_chacha20_ct_run);
	br_ssl_engine_set_poly1305(e, br_poly1305_ctmul_run);
	br_ssl_engine_set_buffer(e, buffer, size, duplex);
	random_bytes(seed, sizeof seed);
	br_ssl_engine_inject_entropy(e, seed, sizeof seed);
}

/* Send the records that the engine has; returns as write() does. */
static ssize_t
send_records(br_ssl_engine_context *e, int fd)
{
	size_t room;
	unsigned char *p = br_ssl_engine_sendrec_buf(e, &room);
	ssize_t n = write(fd, p, room);

	if (n > 0)
		br_ssl_engine_sendrec_ack(e, (size_t)n);
	return n;
}

/* Receive records for the engine; returns as read() does. */
static ssize_t
receive_records(br_ssl_engine_context *e, int fd)
{
	size_t room;
	unsigned char *p = br_ssl_engine_recvrec_buf(e, &room);
	ssize_t n = read(fd, p, room);

	if (n > 0)
		br_ssl_engine_recvrec_ack(e, (size_t)n);
	return n;
}

/*
 * Send and receive until the engine is in one of the states. False if it
 * cannot get there: tls.error has the reason, BR_ERR_OK if the peer closed
 * TLS, BR_ERR_IO if the connection ended without that.
 */
static bool
tls_run(unsigned states)
{
	br_ssl_engine_context *e = &tls.client.eng;
	ssize_t n = 1;

	while (n > 0 || (n < 0 && errno == EINTR)) {
		unsigned now = br_ssl_engine_current_state(e);

		tls.error = br_ssl_engine_last_error(e);
		if (now & (states | BR_SSL_CLOSED))
			return !(now & BR_SSL_CLOSED);
		if (now & BR_SSL_SENDREC)
			n = send_records(e, tls.fd);
		else if (retreat && !wait_early(tls.fd, time_left()))
			break;
		else
			n = receive_records(e, tls.fd);
	}
	tls.error = BR_ERR_IO;
	return false;
}

/*
 * Negotiate TLS over a connection to a host, a name or an address. Its
 * certificate must be valid, unless `any`. Offer a protocol (RFC 7301), unless
 * it is NULL. False: tls_end() has the reason.
 */
static bool
tls_negotiate(int fd, const char *host, bool any, const char *protocol)
{
	static const char *offer[1];

	tls.fd = fd;
	tls.returned = 0;
	chain.any = any;
	chain.ip = ip_bytes(str(host));
	chain.vtable = &chain_vtable;
	br_ssl_client_zero(&tls.client);
	tls_engine(&tls.client.eng, tls.buffer, sizeof tls.buffer, 1);
	br_ssl_engine_set_x509(&tls.client.eng, &chain.vtable);
	offer[0] = protocol;
	br_ssl_engine_set_protocol_names(&tls.client.eng, offer,
	    protocol != NULL);
	br_ssl_client_reset(&tls.client, chain.ip.n ? NULL : host, 0);
	return tls_run(BR_SSL_SENDAPP);
}

/* The same with a CA: its certificate is validated. */
static bool
tls_open(int fd, const char *host)
{
	return tls_negotiate(fd, host, false, NULL);
}

/* The same with any certificate: for respond -c, which sends no secret. */
static bool
tls_open_any(int fd, const char *host, const char *protocol)
{
	return tls_negotiate(fd, host, true, protocol);
}

/* Did the server agree to the protocol that it was offered? */
static bool
tls_has_protocol(void)
{
	return br_ssl_engine_get_selected_protocol(&tls.client.eng) != NULL;
}

/* Send all of s; false if TLS ends before that. */
static bool
tls_write(Str s)
{
	br_ssl_engine_context *e = &tls.client.eng;
	unsigned char *p;
	size_t n;

	while (s.n > 0) {
		if (!tls_run(BR_SSL_SENDAPP))
			return false;
		p = br_ssl_engine_sendapp_buf(e, &n);
		n = n < s.n ? n : s.n;
		memcpy(p, s.p, n);
		br_ssl_engine_sendapp_ack(e, n);
		s = from(s, n);
	}
	br_ssl_engine_flush(e, 0);
	return tls_run(BR_SSL_SENDAPP);
}

/* The next bytes received, valid until the next call; NONE at the end. */
static Str
tls_read(void)
{
	br_ssl_engine_context *e = &tls.client.eng;
	Str s = NONE;

	if (tls.returned)
		br_ssl_engine_recvapp_ack(e, tls.returned);
	if (tls_run(BR_SSL_RECVAPP))
		s.p = br_ssl_engine_recvapp_buf(e, &s.n);
	tls.returned = s.n;
	return s;
}

enum tls_end {
	CLOSED,			/* by the peer, with close_notify */
	CUT_OFF,		/* by the end of the connection */
	UNTRUSTED,		/* by us: the certificate was refused */
	FAILED			/* by a TLS error of either side */
};

enum {			/* BearSSL's errors for alerts that the peer sent */
	ALERT_HANDSHAKE_FAILURE = BR_ERR_RECV_FATAL_ALERT + 40,
	ALERT_PROTOCOL_VERSION  = BR_ERR_RECV_FATAL_ALERT + 70,
	ALERT_UNRECOGNIZED_NAME = BR_ERR_RECV_FATAL_ALERT + 112,
	ALERT_NO_PROTOCOL       = BR_ERR_RECV_FATAL_ALERT + 120
};

/* How TLS ended, and the cause if it is one of the last two. */
static enum tls_end
tls_end(Str *cause)
{
	*cause = NONE;
	if (is_chain_error(tls.error)) {
		*cause = chain_fault(tls.error);
		return UNTRUSTED;
	}
	switch (tls.error) {
	case BR_ERR_OK:
		return CLOSED;
	case BR_ERR_IO:
		return CUT_OFF;
	case BR_ERR_BAD_VERSION:
	case BR_ERR_UNSUPPORTED_VERSION:	/* also the text of HTTP */
	case ALERT_PROTOCOL_VERSION:
		*cause = S("it does not use TLS, or not TLS 1.2");
		break;
	case ALERT_HANDSHAKE_FAILURE:
		*cause = S("no TLS 1.2 cipher suite in common");
		break;
	case ALERT_UNRECOGNIZED_NAME:
		*cause = S("it does not serve that name");
		break;
	case ALERT_NO_PROTOCOL:
		*cause = S("it does not know the protocol " ACME_TLS);
		break;
	default:
		*cause = text("BearSSL error %", num((unsigned)tls.error));
	}
	return FAILED;
}

/* Send close_notify. The connection stays open. */
static void
tls_close(void)
{
	br_ssl_engine_context *e = &tls.client.eng;
	unsigned char *p;
	size_t n;

	br_ssl_engine_close(e);
	while ((p = br_ssl_engine_sendrec_buf(e, &n)) &&
	    write_all(tls.fd, (Str){ p, n }))
		br_ssl_engine_sendrec_ack(e, n);
}

/* TLS with a peer that validates tls-alpn-01. */
struct tls_server {
	const br_ssl_server_policy_class *policy;	/* must be first */
	const struct key *key;
	Str (*find)(Str sni);	/* the certificate for a name, or NONE */
	br_x509_certificate certificate;
	bool done;		/* the handshake is over, and TLS closed */
	br_ssl_server_context context;
};

enum {
	BY_SHA256 = 0xff00 + br_sha256_ID,	/* BearSSL's signatures */
	P256_SIGNATURE = 72	/* bytes at most, in DER (RFC 3279 2.2.3) */
};

/*
 * Choose the first suite that both sides have for an EC key; 0, which fails
 * the handshake, if there is no certificate for the peer's SNI, or the peer
 * does not name our protocol.
 */
static int
alpn_choose(const br_ssl_server_policy_class **policy,
    const br_ssl_server_context *context, br_ssl_server_choices *choices)
{
	struct tls_server *s = (struct tls_server *)policy;
	const char *sni = br_ssl_engine_get_server_name(&context->eng);
	Str certificate = s->find(str(sni));
	const br_suite_translated *suite;
	size_t n;

	suite = br_ssl_server_get_client_suites(context, &n);
	while (n > 0 && (*suite)[1] >> 12 != BR_SSLKEYX_ECDHE_ECDSA) {
		suite++;
		n--;
	}
	if (!certificate.n || n == 0 || !br_ssl_engine_get_selected_protocol(
	    (br_ssl_engine_context *)&context->eng))
		return 0;
	s->certificate.data = (unsigned char *)certificate.p;
	s->certificate.data_len = certificate.n;
	choices->cipher_suite = (*suite)[0];
	choices->algo_id = BY_SHA256;
	choices->chain = &s->certificate;
	choices->chain_len = 1;
	return 1;
}

/* Not called: no suite here exchanges keys with the certificate's key. */
static uint32_t
alpn_keyx(const br_ssl_server_policy_class **policy, unsigned char *p,
    size_t *n)
{
	(void)policy;
	(void)p;
	(void)n;
	return 0;
}

/* Replace the hash at p with its signature; its length, or 0. */
static size_t
alpn_sign(const br_ssl_server_policy_class **policy, unsigned id,
    unsigned char *p, size_t n, size_t room)
{
	const struct tls_server *s = (const struct tls_server *)policy;
	unsigned char h[br_sha256_SIZE];

	if (id != BY_SHA256 || n != sizeof h || room < P256_SIGNATURE)
		return 0;
	memcpy(h, p, n);
	return br_ecdsa_i31_sign_asn1(curves, &br_sha256_vtable, h,
	    &s->key->ec, p);
}

static const br_ssl_server_policy_class alpn_policy = {
	sizeof(br_ssl_server_policy_class *), alpn_choose, alpn_keyx,
	alpn_sign
};

/*
 * Prepare for the handshake of a peer (RFC 8737 3). All certificates that
 * find() returns are for `key`, which is on P-256.
 */
static void
tls_accept(struct tls_server *s, void *buffer, size_t size,
    const struct key *key, Str (*find)(Str sni))
{
	static const char *protocol[] = { ACME_TLS };
	br_ssl_engine_context *e = &s->context.eng;

	s->policy = &alpn_policy;
	s->key = key;
	s->find = find;
	s->done = false;
	br_ssl_server_zero(&s->context);
	tls_engine(e, buffer, size, 0);
	br_ssl_engine_add_flags(e, BR_OPT_FAIL_ON_ALPN_MISMATCH);
	br_ssl_engine_set_protocol_names(e, protocol, 1);
	br_ssl_server_set_policy(&s->context, &s->policy);
	br_ssl_server_reset(&s->context);
}

/*
 * Continue the handshake, which is all of the session (RFC 8737 3), as far as
 * it goes without waiting. False if the connection is finished.
 */
static bool
tls_serve(struct tls_server *s, int fd)
{
	br_ssl_engine_context *e = &s->context.eng;
	ssize_t n = 1;

	while (n > 0) {
		unsigned state = br_ssl_engine_current_state(e);

		if (state & BR_SSL_SENDREC) {
			n = send_records(e, fd);
		} else if (state & BR_SSL_SENDAPP && !s->done) {
			br_ssl_engine_close(e);
			s->done = true;
		} else if (state & BR_SSL_RECVREC) {
			n = receive_records(e, fd);
		} else
			n = 0;
	}
	return n < 0 && (errno == EAGAIN || errno == EINTR);
}

/* ------------------------------------------------------- 22. Processes -- */

/* Remove the variables with secrets: no program that we run needs them. */
static void
drop_secret_variables(void)
{
	char **to = environ;

	for (char **e = environ; *e; e++)
		if (!begins(str(*e), "ACME_EAB_"))
			*to++ = *e;
	*to = NULL;
}

/* In a process that runs no other program: overwrite the environment. */
static void
wipe_environment(void)
{
	for (char **e = environ; *e; e++)
		wipe(*e, strlen(*e));
	*environ = NULL;
}

/* In a new process that will run a program: only the step cleans up. */
static void
become_child(void)
{
	sigset_t none;

	ncleanup = 0;
	retreat = NULL;
	on_record_pipe = false;
	drop_secret_variables();
	prlimit(0, RLIMIT_CORE, &core_limit, NULL);
	signal(SIGPIPE, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static void
cannot_start(void)
{
	die(FAULT, "cannot start a process: %", why());
}

/*
 * Start a process with a pipe between it and this one, or end the step. In
 * both, all signals are blocked on return: here, the caller notes the process
 * and then restores `old`. Returns as fork() does.
 */
static pid_t
start_process(int fds[2], sigset_t *old)
{
	pid_t pid = -1;

	block_signals(old);
	if (pipe(fds) != 0 || (pid = fork()) < 0)
		cannot_start();
	return pid;
}

/* Once the new process is noted: this one reads, the new one writes. */
static void
begin_reading(int fds[2], const sigset_t *old)
{
	sigprocmask(SIG_SETMASK, old, NULL);
	close(fds[1]);
	fcntl(fds[0], F_SETFD, FD_CLOEXEC);
}

/*
 * In a new process, where all signals are blocked: let SIGTERM end it, and
 * SIGALRM when `deadline` has passed, without clean-up. The other signals
 * stay blocked: they are for the step.
 */
static void
end_by_signals(void)
{
	long long left = time_left();
	sigset_t end;

	signal(SIGTERM, SIG_DFL);
	signal(SIGALRM, SIG_DFL);
	alarm(1 + (unsigned)(left > 0 ? left / 1000 : 0));
	sigemptyset(&end);
	sigaddset(&end, SIGTERM);
	sigaddset(&end, SIGALRM);
	sigprocmask(SIG_UNBLOCK, &end, NULL);
}

/* poll(), called again if a signal such as SIGCONT interrupts it. */
static int
wait_for(struct pollfd *p, int ms)
{
	int n;

	do
		n = poll(p, 1, ms);
	while (n < 0 && errno == EINTR);
	return n;
}

/* Kill a process and its group. */
static void
stop_group(const struct cleanup *d)
{
	kill(-d->n, SIGKILL);
	waitpid(d->n, NULL, 0);
}

/* Is a child still running? */
static bool
is_running(pid_t pid)
{
	siginfo_t ended = { .si_pid = 0 };

	return waitid(P_PID, (id_t)pid, &ended, WEXITED | WNOHANG | WNOWAIT)
	    == 0 && !ended.si_pid;
}

/* How a process ended that did not succeed. */
static Str
ending(int status)
{
	if (WIFSIGNALED(status))
		return text("was ended by signal %",
		    num((unsigned)WTERMSIG(status)));
	if (WEXITSTATUS(status) == 127)
		return S("failed with status 127 (not found?)");
	return text("failed with status %", num((unsigned)WEXITSTATUS(status)));
}

/* ---------------------------------------------------- 23. Name look-up -- */

static int family = AF_UNSPEC;		/* -4, -6 */
extern char **environ;

/* The first of two variables that is set and not empty. */
static Str
either(const char *a, const char *b)
{
	Str s = variable(a);

	return s.n ? s : variable(b);
}

/*
 * The values of -H, HOST:PORT:ADDR; several of them can be for the same host
 * and port.
 */
static Str resolved[RESOLVED];
static size_t nresolved;

/* Split HOST:PORT:ADDR; false if it is malformed. */
static bool
read_resolved(Str s, Str *host, Str *port, Str *address)
{
	unsigned long n;

	*host = take_host(&s);
	*port = cut(&s, ':');
	if (begins(s, "[") && s.p[s.n - 1] == ']')
		s = (Str){ s.p + 1, s.n - 2 };
	*address = s;
	return host->n && number(*port, MAX_PORT, &n) && ip_bytes(s).n;
}

static void
add_resolved(Str s)
{
	Str host, port, address;

	if (!read_resolved(s, &host, &port, &address))
		usage("-H needs HOST:PORT:ADDR, not %", s);
	if (nresolved == RESOLVED)
		die(FAULT, "more than % addresses by -H", num(RESOLVED));
	resolved[nresolved++] = s;
}

struct address {
	socklen_t n;
	union {
		struct sockaddr any;
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	} to;
};

/* What a look-up process writes: less than PIPE_BUF bytes. */
struct lookup {
	int error;			/* of getaddrinfo() */
	bool truncated;			/* see is_truncated() */
	size_t n;
	struct address list[ADDRESSES];
};

enum { LOOKUPS = 2 };			/* one for each family */
#define NEVER LLONG_MAX

/* The way to a host: what is looked up, what was found, what is tried. */
static struct {
	struct pollfd fd[LOOKUPS + ATTEMPTS];
	long long until[LOOKUPS + ATTEMPTS];	/* of attempts, by now_ms() */
	struct {
		struct address list[ADDRESSES];
		size_t n, tried;
	} known[2];			/* of IPv6, of IPv4 */
	size_t turn;			/* the family to try next */
	int unknown;			/* error of the lookups, or 0 */
	bool truncated;
	int error;			/* errno of a failed attempt, or 0 */
} way;

/* Close all descriptors that lead to a host. */
static void
close_way(void)
{
	for (size_t i = 0; i < COUNT(way.fd); i++) {
		if (way.fd[i].fd > 2)
			close(way.fd[i].fd);
		way.fd[i].fd = -1;
	}
}

/* Forget the way to the previous host. */
static void
begin_way(void)
{
	memset(&way, 0, sizeof way);
	for (size_t i = 0; i < COUNT(way.fd); i++)
		way.fd[i].fd = -1;
}

static void
add_address(const struct address *a)
{
	size_t i = a->to.any.sa_family == AF_INET;

	if (family != AF_UNSPEC && a->to.any.sa_family != family)
		return;
	if (way.known[i].n < ADDRESSES)
		way.known[i].list[way.known[i].n++] = *a;
}

/* The address of 4 or 16 bytes. */
static struct address
address_of(Str ip)
{
	struct address a = { .n = sizeof a.to.v4 };

	if (ip.n == 4) {
		a.to.v4.sin_family = AF_INET;
		memcpy(&a.to.v4.sin_addr, ip.p, ip.n);
	} else {
		a.n = sizeof a.to.v6;
		a.to.v6.sin6_family = AF_INET6;
		memcpy(&a.to.v6.sin6_addr, ip.p, ip.n);
	}
	return a;
}

static void
add_ip(Str ip)
{
	struct address a = address_of(ip);

	add_address(&a);
}

/* The state of a reader of /etc/hosts. */
struct hosts_reader {
	bool comment;
	size_t nwords;			/* of the line; the first: an address */
	size_t at;			/* bytes of the word so far */
	bool differs;			/* from the name looked for */
};

/* Read a byte of /etc/hosts: true at the end of a word that is the name. */
static bool
is_host(struct hosts_reader *r, unsigned char c, Str name)
{
	bool equal = r->nwords > 0 && !r->differs && r->at == name.n;

	if (c > ' ' && c != '#' && !r->comment) {
		r->differs = r->differs || r->at >= name.n ||
		    name.p[r->at] != c;
		r->at++;
		return false;
	}
	if (r->at > 0)
		r->nwords++;
	r->at = 0;
	r->differs = false;
	r->comment = c != '\n' && (r->comment || c == '#');
	if (c == '\n')
		r->nwords = 0;
	return equal;
}

/* Does /etc/hosts have the name? The file can be of any length. */
static bool
in_hosts(Str name)
{
	struct hosts_reader r = { 0 };
	int fd = open("/etc/hosts", O_RDONLY | O_CLOEXEC);
	unsigned char b[512];
	ssize_t n, i = 0;
	bool found = false;

	if (fd < 0)
		return false;
	while (!found && (n = read(fd, b, sizeof b)) > 0)
		for (i = 0; i < n && !found; i++)
			found = is_host(&r, b[i], name);
	close(fd);
	return found || is_host(&r, '\n', name);
}

/* As in resolv.h, whose macros clash with names of ours and of elf.h. */
int res_query(const char *, int, int, unsigned char *, int);
int res_mkquery(int, const char *, int, int, const unsigned char *, int,
    const unsigned char *, unsigned char *, int);
int dn_expand(const unsigned char *, const unsigned char *,
    const unsigned char *, char *, int);

/*
 * Was the response of the name server truncated? The resolver of musl before
 * 1.2.4 does not try TCP then, and may find no address.
 */
static bool
is_truncated(const char *name, int af)
{
	const int internet = 1, a = 1, aaaa = 28;
	unsigned char answer[512] = { 0 };	/* RFC 1035 4.2.1 */

	res_query(name, internet, af == AF_INET ? a : aaaa, answer,
	    sizeof answer);
	return answer[2] & 2;			/* TC (RFC 1035 4.1.1) */
}

/*
 * In a new process: overwrite all memory that can hold a key. Only then can
 * SIGTERM end the process, or the time limit, even if SIGKILL ended the step.
 */
static void
become_lookup(void)
{
	ncleanup = 0;
	retreat = NULL;
	on_record_pipe = false;
	wipe(heap, peak);
	wipe_environment();
	wipe_secrets();
	wipe_stack();
	end_by_signals();
}

/*
 * In a new process: look up a name in one family or both, and write a struct
 * lookup to fd. The name has at most HOSTNAME bytes and a dot.
 */
static void
run_lookup(const char *name, int af, int fd)
{
	struct addrinfo hint = { .ai_family = af,
	    .ai_socktype = SOCK_STREAM }, *a = NULL;
	struct lookup l = { .n = 0 };
	char copy[HOSTNAME + sizeof "."];

	memcpy(copy, name, strlen(name) + 1);
	become_lookup();
	if (dup2(fd, 1) < 0)	/* do not keep the step's output open */
		leave(FAULT);
	close(0);
	close(2);
	l.error = getaddrinfo(copy, NULL, &hint, &a);
	for (; !l.error && a && l.n < ADDRESSES; a = a->ai_next) {
		l.list[l.n].n = a->ai_addrlen;
		memcpy(&l.list[l.n++].to, a->ai_addr, a->ai_addrlen);
	}
	l.truncated = (l.error == EAI_NONAME || l.error == EAI_NODATA) &&
	    is_truncated(copy, af);
	leave(write(1, &l, sizeof l) == sizeof l ? DONE : FAULT);
}

/* End a look-up; it blocks SIGTERM until it has overwritten the keys. */
static void
stop_lookup(const struct cleanup *d)
{
	kill(d->n, SIGTERM);
	kill(d->n, SIGCONT);
	waitpid(d->n, NULL, 0);
}

static void
start_lookup(struct pollfd *p, const char *name, int af)
{
	sigset_t old;
	int fds[2];
	pid_t pid = start_process(fds, &old);

	if (pid == 0)
		run_lookup(name, af, fds[1]);
	add_cleanup(stop_lookup, pid, NULL);
	begin_reading(fds, &old);
	*p = (struct pollfd){ fds[0], POLLIN, 0 };
}

/*
 * Look up a name; unless it is in /etc/hosts, each family in its own process:
 * getaddrinfo() would wait for both, and fail if one fails.
 */
static void
look_up(const char *name)
{
	way.unknown = 0;
	if (family == AF_UNSPEC && in_hosts(str(name)))
		start_lookup(&way.fd[0], name, AF_UNSPEC);
	else {
		if (family != AF_INET)
			start_lookup(&way.fd[0], name, AF_INET6);
		if (family != AF_INET6)
			start_lookup(&way.fd[1], name, AF_INET);
	}
}

/*
 * Read what a look-up found. "No such name" is reported only if no other
 * error occurred.
 */
static void
end_lookup(struct pollfd *p)
{
	struct lookup l;

	if (read(p->fd, &l, sizeof l) != sizeof l)
		l = (struct lookup){ .error = EAI_FAIL };
	close(p->fd);
	p->fd = -1;
	for (size_t i = 0; i < l.n; i++)
		add_address(&l.list[i]);
	if (l.error && (!way.unknown || way.unknown == EAI_NONAME))
		way.unknown = l.error;
	way.truncated = way.truncated || l.truncated;
}

static bool
is_looking_up(void)
{
	return way.fd[0].fd >= 0 || way.fd[1].fd >= 0;
}

static bool
has_untried(void)
{
	return way.known[0].tried < way.known[0].n ||
	    way.known[1].tried < way.known[1].n;
}

/*
 * Wait for an event until `end`, by now_ms(), or without limit if that is
 * NEVER, and read what was found. False if the time is over.
 */
static bool
poll_way(long long end)
{
	enum { TICK = 20 };	/* ms between looks at the input */
	long long ms;
	int n;

	do {
		ms = end - now_ms();
		if (ms < 0)
			ms = 0;
		else if (retreat && ms > TICK)
			ms = TICK;
		n = poll(way.fd, COUNT(way.fd), ms > INT_MAX ? -1 : (int)ms);
		if (n == 0 && retreat && !wait_early(-1, 0))
			die(LATER, "no early connection");
	} while (n == 0 && ms == TICK && retreat);
	if (n < 0 && errno != EINTR)
		die(FAULT, "cannot wait for the network: %", why());
	for (size_t i = 0; n > 0 && i < LOOKUPS; i++)
		if (way.fd[i].revents)
			end_lookup(&way.fd[i]);
	return n != 0;
}

/*
 * Wait for the first addresses. IPv4 waits LATE_IPV6 ms for IPv6, which is
 * tried first (RFC 8305 3). False if there are none.
 */
static bool
await_addresses(void)
{
	while (is_looking_up() && !way.known[0].n)
		if (!poll_way(way.known[1].n ? now_ms() + LATE_IPV6 : NEVER))
			break;
	return has_untried();
}

/*
 * Find the addresses of a host. A name with a dot is first looked up as it
 * is, whatever ndots in /etc/resolv.conf is: a search domain can fail, or
 * answer for every name. A trailing dot makes the resolver
 * do that, but names in /etc/hosts have none.
 */
static void
find_addresses(const char *name)
{
	Str s = str(name), ip = ip_bytes(s);
	bool whole = !contains(s, S(".")) || s.p[s.n - 1] == '.' ||
	    in_hosts(s);
	int error;

	if (ip.n) {
		add_ip(ip);
		return;
	}
	look_up(whole ? name : c_str(cat(NONE, s, S("."))));
	if (await_addresses() || whole || way.unknown != EAI_NONAME ||
	    way.truncated)
		return;
	error = way.unknown;
	look_up(name);
	await_addresses();
	way.unknown = error;
}

/* --------------------------------------------------------- 24. Dialing -- */

/* The connection; at most one is open. */
static struct {
	int fd;
	char host[HOSTNAME + 1], port[PORT + 1];
	pid_t command;			/* the process behind it, or 0 */
	const unsigned char *from;	/* what has been received: */
	size_t at, have;
	bool whole;			/* and that is all */
	bool plain;			/* without TLS: only to look (-c) */
	long long sent, used;		/* when requests were sent on it, and
					 * when it last was of use; now_ms() */
} conn;

static void
hang_up(void)
{
	if (conn.fd >= 0)
		close(conn.fd);
	conn.fd = -1;
}

/*
 * The next address, of IPv6 and IPv4 in turn (RFC 8305 4); NULL if all were
 * tried.
 */
static struct address *
next_address(void)
{
	for (size_t n = 0; n < COUNT(way.known); n++) {
		size_t i = way.turn;

		way.turn = !i;
		if (way.known[i].tried < way.known[i].n)
			return &way.known[i].list[way.known[i].tried++];
	}
	return NULL;
}

static void
set_port(struct address *a, in_port_t port)
{
	if (a->to.any.sa_family == AF_INET)
		a->to.v4.sin_port = port;
	else
		a->to.v6.sin6_port = port;
}

/* Start to connect; -1 and errno if that fails immediately. */
static int
start_connecting(struct address *a, in_port_t port)
{
	int fd = socket(a->to.any.sa_family, SOCK_STREAM, 0), error;

	set_port(a, port);
	if (fd < 0)
		return -1;
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	if (connect(fd, &a->to.any, a->n) == 0 || errno == EINPROGRESS)
		return fd;
	error = errno;
	close(fd);
	errno = error;
	return -1;
}

/* A free place in `way` for an attempt; 0 if there is none. */
static size_t
free_attempt(void)
{
	for (size_t i = LOOKUPS; i < COUNT(way.fd); i++)
		if (way.fd[i].fd < 0)
			return i;
	return 0;
}

/* Does an error mean that the machine has no way to a family's addresses? */
static bool
lacks_family(int error)
{
	return error == ENETUNREACH || error == EAFNOSUPPORT ||
	    error == EADDRNOTAVAIL;
}

/*
 * Note why an attempt failed. That the machine cannot use a family is reported
 * only if no other error occurred.
 */
static void
note_error(int error)
{
	if (!way.error || !lacks_family(error))
		way.error = error;
}

/*
 * Start to connect to the next address that does not fail immediately; false
 * if there is none, or no free place.
 */
static bool
start_attempt(in_port_t port)
{
	size_t i = free_attempt();

	while (has_untried() && i) {
		way.fd[i] = (struct pollfd){ start_connecting(next_address(),
		    port), POLLOUT, 0 };
		way.until[i] = now_ms() + CONNECT * 1000;
		if (way.fd[i].fd >= 0)
			return true;
		note_error(errno);
	}
	return false;
}

/* Has an attempt failed? Then its descriptor is closed. */
static bool
has_failed(size_t i)
{
	int error = 0;
	socklen_t n = sizeof error;

	if (way.fd[i].fd < 0)
		return false;
	if (!way.fd[i].revents && now_ms() >= way.until[i])
		error = ETIMEDOUT;
	else if (way.fd[i].revents && getsockopt(way.fd[i].fd, SOL_SOCKET,
	    SO_ERROR, &error, &n) != 0)
		error = errno;
	if (!error)
		return false;
	close(way.fd[i].fd);
	way.fd[i].fd = -1;
	note_error(error);
	return true;
}

/* When the first of the attempts times out; NEVER if there are none. */
static long long
attempts_end(void)
{
	long long end = NEVER;

	for (size_t i = LOOKUPS; i < COUNT(way.fd); i++)
		if (way.fd[i].fd >= 0 && way.until[i] < end)
			end = way.until[i];
	return end;
}

/*
 * Connect to the first address that accepts, and return its place in `way`; 0
 * if none does. Each address has a head start over the next one, unless it
 * fails (RFC 8305 5).
 */
static size_t
race(in_port_t port)
{
	long long next = 0, end;

	for (;;) {
		if (now_ms() >= next && start_attempt(port))
			next = now_ms() + HEAD_START;
		end = attempts_end();
		if (end == NEVER && !is_looking_up())
			return 0;
		if (has_untried() && free_attempt() && next < end)
			end = next;
		poll_way(end);
		for (size_t i = LOOKUPS; i < COUNT(way.fd); i++)
			if (has_failed(i))
				next = 0;
			else if (way.fd[i].fd >= 0 && way.fd[i].revents)
				return i;
	}
}

/*
 * Add the addresses that -H gives for a host and port; false if it gives
 * none.
 */
static bool
add_resolved_addresses(Str name, Str port)
{
	Str host, at, address;
	bool any = false;

	for (size_t i = 0; i < nresolved; i++) {
		read_resolved(resolved[i], &host, &at, &address);
		if (!same_nocase(host, name) || !same(at, port))
			continue;
		add_ip(ip_bytes(address));
		any = true;
	}
	return any;
}

/* Why no address was found. */
static Str
no_address(void)
{
	if (way.truncated)
		return S("the name server's response was truncated (too many "
		    "addresses for this resolver)");
	return way.unknown ? str(gai_strerror(way.unknown)) :
	    S("it has only those that -4 or -6 excludes");
}

/*
 * Connect by TCP. Addresses given with -H take precedence over the resolver.
 */
static int
dial_tcp(const char *name, const char *port)
{
	size_t mark = ncleanup, winner;
	unsigned long n = 0;
	int fd, on = 1;

	begin_way();
	number(str(port), MAX_PORT, &n);
	doing(CA_DOWN, "looking up the address of", name);
	if (!add_resolved_addresses(str(name), str(port)))
		find_addresses(name);
	if (!has_untried()) {
		if (way.truncated)
			remedy = S("; use -H");
		die(CA_DOWN, "cannot find the address of %: %", str(name),
		    no_address());
	}
	doing(CA_DOWN, "connecting to", name);
	if (!(winner = race(htons((in_port_t)n))))
		die(CA_DOWN, "cannot connect to % port %: %", str(name),
		    str(port), str(strerror(way.error)));
	fd = way.fd[winner].fd;
	way.fd[winner].fd = -1;
	close_way();
	clean_up_to(mark);
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	return fd;
}

static const char *proxy_command;	/* -P */

/* The first word of the command; the others can contain a password. */
static Str
command_name(void)
{
	const char *s = proxy_command + strspn(proxy_command, " \t\n");

	return (Str){ (const unsigned char *)s, strcspn(s, " \t\n") };
}

enum { ENDING = 1000 };	/* ms to end at the end of input, and at SIGTERM */

/*
 * End a command of -P that shares our process group: a signal to the group
 * would also reach other programs. Most commands end, with all that they
 * started, at the end of their input. SIGTERM lets one that asks for a
 * password restore the echo of the terminal.
 */
static void
stop_command(const struct cleanup *d)
{
	const int tick = 10;

	hang_up();
	for (int ms = 0; ms < 2 * ENDING && is_running(d->n); ms += tick) {
		if (ms == ENDING) {
			kill(d->n, SIGTERM);
			kill(d->n, SIGCONT);
		}
		sleep_for(tick);
	}
	if (is_running(d->n))
		kill(d->n, SIGKILL);
	waitpid(d->n, NULL, 0);
}

/* Is there a terminal on which the command can ask for a password? */
static bool
has_terminal(void)
{
	int fd = open("/dev/tty", O_RDWR | O_NOCTTY);

	return fd >= 0 && close(fd) == 0;
}

/*
 * The command for /bin/sh, with %h, %p and %% replaced. The host has no
 * characters that are special to a shell.
 */
static const char *
fill_command(const char *host, const char *port)
{
	Str s = str(proxy_command), all = S("exec ");

	for (;;) {
		size_t n = s.n;
		Str head = cut(&s, '%');

		all = cat(NONE, all, head);
		if (head.n == n)
			return c_str(all);
		if (!s.n || !strchr("hp%", s.p[0]))
			usage("-P accepts only %, % and %", S("%h"), S("%p"),
			    S("%" "%"));
		if (s.p[0] == 'h')
			all = cat(NONE, all, str(host));
		else
			all = cat(NONE, all, s.p[0] == 'p' ? str(port) :
			    S("%"));
		s = from(s, 1);
	}
}

/*
 * A connection through the standard input and output of a command (-P). On a
 * terminal the command stays in our process group: in a background group ssh
 * could not ask for a password.
 */
static int
dial_command(const char *host, const char *port)
{
	const char *command = fill_command(host, port);
	bool shares = has_terminal();
	sigset_t old;
	int fds[2];

	doing(CA_DOWN, "connecting through", c_str(command_name()));
	block_signals(&old);
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0 ||
	    (conn.command = fork()) < 0)
		cannot_start();
	if (conn.command == 0) {
		become_child();
		if (!shares)
			setpgid(0, 0);
		if (dup2(fds[1], 0) == 0 && dup2(fds[1], 1) == 1) {
			close(fds[0]);
			close(fds[1]);
			execv("/bin/sh", (char *const []){ (char *)"sh",
			    (char *)"-c", (char *)command, NULL });
		}
		warn("cannot run /bin/sh for -P: %", why());
		leave(127);
	}
	if (!shares)
		setpgid(conn.command, conn.command);
	cleanup[0] = (struct cleanup){ shares ? stop_command : stop_group,
	    conn.command, NULL };
	sigprocmask(SIG_SETMASK, &old, NULL);
	close(fds[1]);
	fcntl(fds[0], F_SETFD, FD_CLOEXEC);
	return fds[0];
}

/* --------------------------------------------------------- 25. Proxies -- */

/* Is an address in the network ADDRESS/BITS (RFC 4632 3.1)? */
static bool
in_network(Str ip, Str network)
{
	Str base = ip_bytes(cut(&network, '/'));
	unsigned char mask[16] = { 0 };
	unsigned long prefix;

	if (!ip.n || ip.n != base.n || !number(network, 8 * ip.n, &prefix))
		return false;
	for (size_t i = 0; i < prefix; i++)
		mask[i / 8] |= (unsigned char)(0x80 >> i % 8);
	return ip_within(ip, cat(NONE, base, (Str){ mask, ip.n }));
}

/*
 * Does an entry of no_proxy match the host? It is "*", a network, or a host or
 * parent domain, with or without a port.
 */
static bool
is_entry(Str entry, Str host, Str port)
{
	Str ip = ip_bytes(host), s = entry;

	if (in_network(ip, entry))
		return true;
	if (!ip_bytes(entry).n) {	/* an IPv6 address has colons, too */
		entry = take_host(&s);
		if (s.n && !same(s, port))
			return false;
	}
	if (is(entry, "*") || same_nocase(entry, host) ||
	    (ip.n && same(ip_bytes(entry), ip)))
		return true;
	if (begins(entry, "."))
		entry = from(entry, 1);
	return entry.n && !ip.n && host.n > entry.n &&
	    host.p[host.n - entry.n - 1] == '.' &&
	    same_nocase(from(host, host.n - entry.n), entry);
}

/* Does an entry of no_proxy match the host? */
static bool
needs_no_proxy(Str host, Str port)
{
	Str list = either("no_proxy", "NO_PROXY"), s;

	while (list.n) {
		for (s = list; s.n && s.p[0] != ',' && s.p[0] > ' '; )
			s = from(s, 1);
		if (is_entry((Str){ list.p, list.n - s.n }, host, port))
			return true;
		list = from(s, 1);
	}
	return false;
}

/* http://[USER:PASSWORD@]HOST[:PORT][/], the form of https_proxy. */
struct proxy {
	Str user, password;		/* percent-encoded; NONE if absent */
	Str host, port;
};

/*
 * Take the scheme off the URL of a proxy; without one it is http. False for
 * any other: with https:// the user expects a password to be encrypted.
 */
static bool
take_scheme(Str *s)
{
	Str rest = *s, scheme = cut(&rest, ':');

	if (!contains(*s, S("://")))
		return true;
	*s = from(rest, 2);
	return same_nocase(scheme, S("http")) && begins(rest, "//");
}

/*
 * Take USER:PASSWORD@ off the front of s. It ends at the last @, even if
 * the password has one: messages show the rest.
 */
static Str
take_userinfo(Str *s)
{
	Str all = *s;
	size_t n = s->n;

	while (n > 0 && s->p[n - 1] != '@')
		n--;
	*s = from(*s, n);
	return (Str){ all.p, n > 0 ? n - 1 : 0 };
}

/*
 * Read the URL of a proxy. It can contain a password, so no message shows it.
 */
static void
read_proxy(Str s, struct proxy *p)
{
	bool http = take_scheme(&s);
	Str authority = cut(&s, '/');

	*p = (struct proxy){ .port = S("80") };
	p->password = take_userinfo(&authority);
	p->user = cut(&p->password, ':');
	if (!http || s.n || !host_port(authority, &p->host, &p->port))
		usage("https_proxy must be http://[USER:PASSWORD@]HOST[:PORT]");
}

/* The proxy for a host, or NONE. */
static Str
proxy_to(Str host, Str port)
{
	return needs_no_proxy(host, port) ? NONE :
	    either("https_proxy", "HTTPS_PROXY");
}

/* End the step if the proxy for the host of a URL is malformed. */
static void
check_proxy(Str url)
{
	struct url u;
	struct proxy p;
	Str proxy;

	if (proxy_command || !url_read(url, &u))
		return;
	proxy = proxy_to(u.host, u.port);
	if (proxy.n)
		read_proxy(proxy, &p);
}

/* Decode percent-encoding (RFC 3986 2.1). */
static Str
percent_decoded(Str s)
{
	size_t mark = used;
	unsigned char *o = alloc(s.n);
	size_t n = 0;

	for (; s.n; s = from(s, 1)) {
		o[n] = s.p[0];
		if (s.p[0] == '%' && s.n > 2 && made_of((Str){ s.p + 1, 2 },
		    DIGIT "abcdefABCDEF")) {
			o[n] = unhex(lower((Str){ s.p + 1, 2 })).p[0];
			s = from(s, 2);
		}
		n++;
	}
	return keep(mark, (Str){ o, n });
}

/* A line from a proxy, without its CR LF; no byte more, since TLS follows. */
static Str
proxy_line(int fd, size_t *room, Str name)
{
	Str s = { heap + used, 0 };
	unsigned char c;

	for (;;) {
		ssize_t n = retreat && !wait_early(fd, time_left()) ? 0 :
		    read(fd, &c, 1);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0 || --*room == 0)
			die(CA_DOWN, "no valid response from the "
			    "proxy %", name);
		if (c == '\n')
			break;
		*alloc(1) = c;
		s.n++;
	}
	if (s.n && s.p[s.n - 1] == '\r')
		s.n--;
	return s;
}

/* A header field; nothing if the value is NONE. */
static Str
header(const char *name, Str value)
{
	return value.n ? text("%: %\r\n", str(name), value) : NONE;
}

/*
 * The user and password of a proxy for a header field (RFC 7617 2), or NONE.
 */
static Str
credentials(const struct proxy *p)
{
	return !p->user.n && !p->password.n ? NONE : text("Basic %",
	    base64(text("%:%", percent_decoded(p->user),
	        percent_decoded(p->password))));
}

/*
 * The status of a proxy that was sent a password: it may echo that, so only
 * the code is shown.
 */
static Str
answer_without_secrets(Str code)
{
	return code.n == 3 && made_of(code, DIGIT) ? text("status %", code) :
	    S("its response is not HTTP");
}

/*
 * Read the status line of the response of a proxy, and its code. Interim
 * responses, such as 100, may precede it (RFC 9110 15.2).
 */
static Str
proxy_status(int fd, size_t *room, Str name, Str *code)
{
	for (;;) {
		Str status = proxy_line(fd, room, name);

		*code = status;
		cut(code, ' ');
		*code = cut(code, ' ');
		if (!begins(status, "HTTP/1.") || !begins(*code, "1") ||
		    is(*code, "101"))
			return status;
		while (proxy_line(fd, room, name).n)
			continue;
	}
}

/* A connection through a proxy (RFC 9110 9.3.6). */
static int
dial_proxy(Str url, const char *host, const char *port)
{
	Str target = text(strchr(host, ':') ? "[%]:%" : "%:%", str(host),
	    str(port)), status, code, basic;
	size_t room = HEAD;
	struct proxy p;
	int fd;

	read_proxy(url, &p);
	basic = credentials(&p);
	conn.fd = fd = dial_tcp(c_str(p.host), c_str(p.port));
	doing(CA_DOWN, "waiting for the proxy", c_str(p.host));
	if (!write_all(fd, cat(text("CONNECT % HTTP/1.1\r\n", target),
	    header("Host", target), header("Proxy-Authorization", basic),
	    S("\r\n"))))
		die(CA_DOWN, "cannot write to the proxy %: %", p.host, why());
	status = proxy_status(fd, &room, p.host, &code);
	if (!begins(status, "HTTP/1.") || !begins(code, "2"))
		die(CA_DOWN, "the proxy % refused to connect to %: %", p.host,
		    target, basic.n ? answer_without_secrets(code) :
		    brief(status));
	while (proxy_line(fd, &room, p.host).n)
		continue;
	return fd;
}

/* A connection to host:port, as a file descriptor. */
static int
dial(const char *host, const char *port)
{
	Str proxy = proxy_to(str(host), str(port));

	if (proxy_command)
		return dial_command(host, port);
	return proxy.n ? dial_proxy(proxy, host, port) : dial_tcp(host, port);
}

/* ------------------------------------------------------ 26. Connection -- */

/* How the command behind the connection ended, if it did. */
static Str
command_fault(void)
{
	int status;

	sleep_for(100);
	if (waitpid(conn.command, &status, WNOHANG) != conn.command)
		return text("the command % ended the connection",
		    command_name());
	return text("the command % %", command_name(), ending(status));
}

/*
 * End the step: TLS with the server failed. An untrusted certificate
 * stays so until the anchors, the name, the clock or the server are corrected;
 * anything else may be temporary.
 */
static void
conn_failed(void)
{
	Str words;
	enum tls_end end = tls_end(&words);

	if (!words.n)
		words = conn.command ? command_fault() :
		    S("the connection ended during the TLS handshake");
	die(end == UNTRUSTED ? CONFIG : CA_DOWN, "TLS with % failed: %",
	    str(conn.host), words);
}

/* Did the connection end without a close_notify of TLS? */
static bool
is_cut_off(void)
{
	Str words;

	return !conn.whole && !conn.plain && tls_end(&words) != CLOSED;
}

static void
conn_close(void)
{
	if (conn.fd < 0)
		return;
	tls_close();
	hang_up();
	if (conn.command)
		cleanup[0].end(&cleanup[0]);
	cleanup[0].end = NULL;
	conn.command = 0;
}

/*
 * Can the connection be used? A server ends idle ones, which can be read
 * then, and a NAT forgets them.
 */
static bool
is_alive(void)
{
	struct pollfd p = { conn.fd, POLLIN, 0 };

	return conn.fd >= 0 && conn.at == conn.have && poll(&p, 1, 0) == 0 &&
	    now_ms() - conn.used < IDLE * 1000;
}

/* Connect to the host of a URL, unless the open connection leads there. */
static void
conn_open(const struct url *u)
{
	Str host = lower(u->host);

	if (is_alive() && same(host, str(conn.host)) &&
	    same(u->port, str(conn.port)))
		return;
	conn_close();
	memcpy(conn.host, c_str(host), host.n + 1);
	memcpy(conn.port, c_str(u->port), u->port.n + 1);
	conn.at = conn.have = 0;
	conn.fd = dial(conn.host, conn.port);
	doing(CA_DOWN, "negotiating TLS with", conn.host);
	if (!tls_open(conn.fd, conn.host))
		conn_failed();
	conn.used = now_ms();
}

/*
 * Connect to the host of a URL before there is a request for it. A failure
 * has no effect, since the connection is made again when it is needed; so
 * does input that comes first, or the limit of EARLY seconds.
 */
static void
connect_early(const struct url *u)
{
	const size_t mark = ncleanup;
	sigjmp_buf here;	/* with the signals, which may be blocked */

	deadline = now_ms() + EARLY * 1000;
	retreat = &here;
	if (sigsetjmp(here, 1) == 0)
		conn_open(u);
	else {
		close_way();
		hang_up();
		remedy = NONE;
	}
	retreat = NULL;
	clean_up_to(mark);
}

/* The next bytes of a connection without TLS, as tls_read() returns them. */
static Str
plain_read(void)
{
	static unsigned char b[2048];
	ssize_t n = 0;

	if (wait_early(conn.fd, time_left()))
		n = read(conn.fd, b, sizeof b);
	return (Str){ b, n > 0 ? (size_t)n : 0 };
}

/* Receive more; false at the end of the connection. */
static bool
conn_fill(void)
{
	Str s, words;

	if (conn.whole)
		return false;
	s = conn.plain ? plain_read() : tls_read();
	conn.from = s.p;
	conn.at = 0;
	conn.have = s.n;
	if (s.n == 0 && !conn.plain && tls_end(&words) >= UNTRUSTED)
		conn_failed();
	return s.n > 0;
}

/* The next byte, or -1 at the end of the connection. */
static int
conn_byte(void)
{
	if (conn.at == conn.have && !conn_fill())
		return -1;
	return conn.from[conn.at++];
}

/* ------------------------------------------------------------ 27. HTTP -- */

struct request {
	const char *method;
	Str url, body;
	bool once;		/* not sent again if its response is lost */
	int lost;		/* responses to it that were lost */
};

struct response {
	int status;
	Str url, location, nonce;
	Str head, body;		/* one after the other, on the heap */
	long retry_after;	/* seconds from now, -1 if absent */
	bool last;		/* the connection ends with it */
};

/* End the step for a response that breaks HTTP, JSON or ACME; r has a url. */
#define broken(r, ...) \
    (ALL_STR(__VA_ARGS__, NONE), fail_response(&(r)->url, __VA_ARGS__))

static void fail_response(const Str *, const char *, ...)
    __attribute__((noreturn));

static void
fail_response(const Str *url, const char *template, ...)
{
	va_list ap;

	preamble = text("the response from % ", brief(*url));
	va_start(ap, template);
	fail_by(BROKEN, template, &ap);
}

static bool verbose;		/* -v */

/*
 * Read a line onto the top of the heap; its bytes are taken off *room, and *s
 * lacks its CR LF. False if the connection ends before the line does.
 */
static bool
http_line(struct response *r, size_t *room, Str *s)
{
	int c;

	*s = (Str){ heap + used, 0 };
	while ((c = conn_byte()) != '\n') {
		if (c < 0)
			return false;
		if ((*room)-- == 0)
			die(FAULT, "the header of the response from % is "
			    "larger than % KiB", r->url, num(HEAD >> 10));
		*alloc(1) = (unsigned char)c;
		s->n++;
	}
	*alloc(1) = '\n';
	if (s->n && s->p[s->n - 1] == '\r')
		s->n--;
	for (size_t i = 0; i < s->n; i++)
		if ((s->p[i] < ' ' && s->p[i] != '\t') || s->p[i] == 0x7f)
			broken(r, "has a control character in its header");
	return true;
}

static void
cut_off(const struct response *r)
{
	die(CA_DOWN, "the connection ended in the middle of the response "
		    "from %",
	    r->url);
}

/* HTTP/1.x NNN (RFC 9112 4). */
static int
http_status(struct response *r, Str s)
{
	unsigned long n;
	Str version = cut(&s, ' '), code = cut(&s, ' ');

	if (!begins(version, "HTTP/1.") || version.n != 8 || code.n != 3 ||
	    !made_of(from(version, 7), "01") || !number(code, 599, &n) ||
	    n < 100)
		broken(r, "is not HTTP/1");
	r->last = version.p[7] == '0';
	return (int)n;
}

/*
 * Retry-After, a number or a date (RFC 9110 10.2.3), in seconds up to MAX_WAIT;
 * 0 if it is past or negative, -1 if it is malformed.
 */
static long
retry_after(Str s)
{
	unsigned long n;
	long long t;

	if (begins(s, "-"))
		return 0;
	if (number(s, MAX_WAIT, &n))
		return (long)n;
	if (made_of(s, DIGIT))
		return MAX_WAIT;
	if (!http_date(s, &t))
		return -1;
	t -= now_seconds();
	if (t < 0)
		return 0;
	return t < MAX_WAIT ? (long)t : MAX_WAIT;
}

/* How long the body is: a length, chunks, or to the end. */
struct framing {
	bool has_length, chunked;
	unsigned long length;
};

/* Use a header field, if we know it (RFC 9112 5). */
static void
http_field(struct response *r, struct framing *f, Str name, Str value)
{
	unsigned long n;

	if (same_nocase(name, S("Location")))
		r->location = value;
	else if (same_nocase(name, S("Replay-Nonce"))) {
		/* RFC 8555 6.5.1: what is not base64url must be ignored. */
		if (is_b64(value) && value.n <= NONCE)
			r->nonce = value;
	} else if (same_nocase(name, S("Retry-After")))
		r->retry_after = retry_after(value);
	else if (same_nocase(name, S("Content-Length"))) {
		if (!number(value, 1UL << 31, &n) ||
		    (f->has_length && n != f->length))
			broken(r, "has an invalid or second, different "
			    "Content-Length: %", brief(value));
		f->has_length = true;
		f->length = n;
	} else if (same_nocase(name, S("Transfer-Encoding"))) {
		if (!same_nocase(value, S("chunked")) || f->chunked)
			broken(r, "has an unsupported "
			    "Transfer-Encoding: %", brief(value));
		f->chunked = true;
	} else if (same_nocase(name, S("Connection")))
		while (value.n)
			if (same_nocase(trim(cut(&value, ',')), S("close")))
				r->last = true;
}

/* Read a header; false if the connection ends before it begins. */
static bool
http_head(struct response *r, struct framing *f)
{
	size_t room = HEAD;
	Str s, name;

	do {
		if (!http_line(r, &room, &s)) {
			if (s.n == 0 && room == HEAD)
				return false;
			cut_off(r);
		}
		r->head.p = s.p;
		r->status = http_status(r, s);
		for (;;) {
			if (!http_line(r, &room, &s))
				cut_off(r);
			if (s.n == 0)
				break;
			name = cut(&s, ':');
			if (name.p + name.n == s.p ||
			    !made_of(name, ALPHA DIGIT "!#$%&'*+-.^_`|~"))
				broken(r, "has a malformed header");
			if (r->status >= 200)
				http_field(r, f, name, trim(s));
		}
	} while (r->status < 200);
	r->head.n = (size_t)(heap + used - r->head.p);
	return true;
}

/* The next value of a header field; `head` becomes what follows it. */
static bool
next_field(Str *head, Str name, Str *value)
{
	while (head->n) {
		*value = cut(head, '\n');
		if (!same_nocase(cut(value, ':'), name))
			continue;
		if (value->n && value->p[value->n - 1] == '\r')
			value->n--;
		*value = trim(*value);
		return true;
	}
	return false;
}

/* Read n more bytes of the body onto the top of the heap. */
static void
http_bytes(struct response *r, unsigned long n)
{
	if (n > BODY || r->body.n + n > BODY)
		die(FAULT, "the response from % is larger than % KiB", r->url,
		    num(BODY >> 10));
	while (n-- > 0) {
		int c = conn_byte();

		if (c < 0)
			cut_off(r);
		*alloc(1) = (unsigned char)c;
		r->body.n++;
	}
}

/* A chunk's size in hexadecimal, before its extensions (RFC 9112 7.1). */
static unsigned long
chunk_size(struct response *r, Str s)
{
	Str size = cut(&s, ';');
	unsigned long n = 0;

	while (size.n && strchr(" \t", size.p[size.n - 1]))
		size.n--;
	if (!made_of(size, DIGIT "abcdefABCDEF"))
		broken(r, "has a chunk with an invalid size");
	for (size_t i = 0; i < size.n; i++) {
		int c = lower_case(size.p[i]);

		n = n << 4 | (unsigned)(c <= '9' ? c - '0' : c - 'a' + 10);
		if (n > BODY)
			http_bytes(r, n);
	}
	return n;
}

static void
http_chunks(struct response *r)
{
	size_t room = HEAD, mark;
	unsigned long n;
	Str s;

	do {
		mark = used;
		if (!http_line(r, &room, &s))
			cut_off(r);
		n = chunk_size(r, s);
		used = mark;
		http_bytes(r, n);
		mark = used;
		if (!http_line(r, &room, &s))
			cut_off(r);
		if (n && s.n)
			broken(r, "has a chunk of the wrong size");
		while (!n && s.n)	/* trailers */
			if (!http_line(r, &room, &s))
				cut_off(r);
		used = mark;
		room = HEAD;
	} while (n);
}

/*
 * Receive the response to a request; false if the connection ends before it
 * begins.
 */
static bool
http_receive(const struct request *q, struct response *r)
{
	struct framing f = { false, false, 0 };

	*r = (struct response){ .url = q->url, .retry_after = -1 };
	doing(CA_DOWN, "waiting for a response from", conn.host);
	if (!http_head(r, &f))
		return false;
	r->body = (Str){ heap + used, 0 };
	if (strcmp(q->method, "HEAD") == 0 || r->status == 204 ||
	    r->status == 304)
		;
	else if (f.chunked && f.has_length)
		broken(r, "has both Content-Length and Transfer-Encoding");
	else if (f.chunked)
		http_chunks(r);
	else if (f.has_length)
		http_bytes(r, f.length);
	else {
		r->last = true;
		while (conn_byte() >= 0) {
			conn.at--;
			http_bytes(r, 1);
		}
		if (is_cut_off())
			cut_off(r);
	}
	if (verbose)
		warn("% %: %", str(q->method), q->url,
		    num((unsigned)r->status));
	return true;
}

/*
 * A request as it is sent (RFC 9112 3, RFC 8555 6.1 and 6.2), with the target
 * in its first line.
 */
static Str
http_text(const struct request *q, const struct url *u, Str target)
{
	return text("% % HTTP/1.1\r\nHost: %\r\n"
	    "User-Agent: acme-step/" VERSION "\r\n%\r\n%",
	    str(q->method), target, u->authority, q->body.n ?
	    text("Content-Type: application/jose+json\r\n"
	        "Content-Length: %\r\n", num(q->body.n)) : NONE, q->body);
}

/* Split the URL of a request, which was checked when it was read. */
static void
request_url(const struct request *q, struct url *u)
{
	if (!url_read(q->url, u))
		die(FAULT, "cannot request %: it is not an https URL",
		    brief(q->url));
}

/* The path and query of a URL; there is always a path (RFC 9112 3.2.1). */
static Str
url_target(const struct url *u)
{
	return u->path.n && u->path.p[0] == '/' ? u->path :
	    text("/%", u->path);
}

/* 408: the server gave up waiting for a request (RFC 9110 15.5.9). */
enum { TIMED_OUT = 408 };

/*
 * Send requests to one origin, all in one write, and receive their responses
 * in order. Returns how many came before a 408, if any.
 */
static size_t
pipeline(const struct request *q, struct response *r, size_t n)
{
	struct url u, v;
	size_t mark, m = 0, got = 0;
	Str all = NONE;

	request_url(&q[0], &u);
	conn_open(&u);
	mark = used;
	do {
		request_url(&q[m], &v);
		all = keep(mark, cat(NONE, all, http_text(&q[m], &v,
		    url_target(&v))));
	} while (++m < n);
	doing(CA_DOWN, "sending to", conn.host);
	conn.sent = now_ms();
	if (!tls_write(all))
		m = 0;
	used = mark;
	while (got < m && http_receive(&q[got], &r[got]) &&
	    r[got].status != TIMED_OUT)
		if (r[got++].last)
			break;
	if (got == 0 || got < m || r[got - 1].last)
		conn_close();
	conn.used = now_ms();
	return got;
}

/* ------------------------------------------------------------- 28. Box -- */

/*
 * The box (-B): HTTP messages are files in it, N.request and N.response, in
 * the order of the requests.  acme-step send exchanges them with the CA.  The
 * step, run again in the same way, makes the same requests, since its
 * signatures have no randomness in them, and finds the responses.
 */
static struct {
	const char *name;		/* NULL: there is none */
	int dir;
	unsigned long n;		/* requests so far */
	size_t published;		/* ncleanup before publishing, or 0 */
} box;

static const char *
box_file(unsigned long n, const char *kind)
{
	return c_str(text("%.%", num(n), str(kind)));
}

/* Read a file in the box; false if there is none. */
static bool
box_read(const char *name, Str *s)
{
	int fd = openat(box.dir, name, O_RDONLY | O_NOCTTY | O_CLOEXEC |
	    O_NONBLOCK);

	if (fd < 0 && errno == ENOENT)
		return false;
	if (fd < 0)
		die(MISSING, "cannot open % in %: %", str(name), str(box.name),
		    why());
	*s = read_all(fd, c_str(text("%/%", str(box.name), str(name))),
	    look_away);
	close(fd);
	return true;
}

/* Write a new file in the box; it is complete or absent. */
static void
box_write(const char *name, Str s)
{
	const char *temporary;
	int fd = create_temporary(box.dir, &temporary, 0666);

	if (fd < 0)
		die(NO_PLACE, "cannot create a file in %: %", str(box.name),
		    why());
	if (!write_all(fd, s) || !synced(fd) || close(fd) != 0 ||
	    renameat(box.dir, temporary, box.dir, name) != 0)
		die(IO, "cannot write % in %: %", str(name), str(box.name),
		    why());
	cancel_cleanup();
}

/* A part of a JWS in plain text, on one line. */
static Str
jws_part(Str body, const char *name)
{
	Str o, s = json_read(body, &o) ? unb64(text_of(o, name)) : NONE;
	unsigned char *p = alloc(s.n);

	for (size_t i = 0; i < s.n; i++)
		p[i] = s.p[i] < ' ' ? ' ' : s.p[i];
	return shown((Str){ p, s.n });
}

/*
 * The content of a request file: what it says in plain text, as comments, and
 * then the request with an absolute URL (RFC 9112 3.2.2).
 */
static Str
box_request(const struct request *q)
{
	Str comments = q->body.n ? text("# protected: %\n# payload: %\n",
	    jws_part(q->body, "protected"), jws_part(q->body, "payload")) :
	    NONE;
	struct url u;

	request_url(q, &u);
	return cat(NONE, comments, http_text(q, &u, q->url));
}

/*
 * A checksum of a response and its request: files that are swapped, cut or
 * edited by mistake are noticed.
 */
static Str
box_check(Str request, Str response)
{
	return b64(sha256(cat(NONE, sha256(request), sha256(response))));
}

/*
 * The content of a response file: the header fields that a step uses, and the
 * body.
 */
static Str
box_response(const struct response *r)
{
	Str head = r->head, links = NONE, value;

	while (next_field(&head, S("Link"), &value))
		links = cat(NONE, links, header("Link", value));
	return cat(text("HTTP/1.1 % \r\n", num((unsigned)r->status)),
	    header("Location", r->location),
	    header("Replay-Nonce", r->nonce),
	    links,
	    header("Retry-After", r->retry_after < 0 ? NONE :
	        num((unsigned long)r->retry_after)),
	    header("Content-Length", num(r->body.n)),
	    S("\r\n"), r->body);
}

#define BOX_CHECK "Acme-Step-Check: "

/* Take the check off the end of a stored response; false if it is wrong. */
static bool
box_open(Str request, Str *s)
{
	size_t tail = sizeof BOX_CHECK - 1 + 43 + 1;
	Str check;

	if (s->n < tail)
		return false;
	check = from(*s, s->n - tail);
	s->n -= tail;
	return same(check, text(BOX_CHECK "%\n", box_check(request, *s)));
}

static void
box_refuse(const char *what)
{
	die(BAD, "% in % %", str(box_file(box.n, "response")), str(box.name),
	    str(what));
}

/*
 * Write the next request to the box, if it is not there, and read its
 * response; false if there is none.
 */
static bool
box_exchange(const struct request *q, struct response *r)
{
	const char *name = box_file(++box.n, "request");
	size_t mark = used;
	Str request = box_request(q), old, s;

	if (!box_read(name, &old))
		box_write(name, request);
	else if (!same(old, request))
		die(BAD, "% in % belongs to another step; use a box for each "
		    "step", str(name), str(box.name));
	if (!box_read(box_file(box.n, "response"), &s))
		return false;
	if (!box_open(request, &s))
		box_refuse("is not the response to that request");
	s = keep(mark, s);
	conn.from = s.p;
	conn.at = 0;
	conn.have = s.n;
	conn.whole = true;
	if (!http_receive(q, r) || conn.at != conn.have)
		box_refuse("is incomplete");
	return true;
}

/*
 * Take all responses to a batch from the box, or write the requests that lack
 * one and end the step. What is published then stays, since the step will be
 * run again.
 */
static void
box_batch(const struct request *q, struct response *r, size_t n)
{
	size_t lack = 0;

	for (size_t i = 0; i < n; i++)
		lack += !box_exchange(&q[i], &r[i]);
	if (lack == 0)
		return;
	if (box.published)
		ncleanup = box.published;
	die(LATER, "% has % request% without a response; run acme-step send "
	    "%, then this step again%", str(box.name), num(lack),
	    lack == 1 ? NONE : S("s"), str(box.name),
	    box_pause < 1000 ? NONE : text("; not before % s have passed",
	    num((unsigned long long)box_pause / 1000)));
}

/* Use a directory as the box; `make`: create it if it does not exist. */
static void
open_box(const char *name, bool make)
{
	struct stat st;

	if (make && mkdir(name, 0777) != 0 && errno != EEXIST)
		die(NO_PLACE, "cannot create %: %", str(name), why());
	if (make && lstat(name, &st) == 0 && is_of_others(name, &st))
		die(NO_PLACE, "cannot use %: it belongs to another user, in a "
		    "directory that others can write", str(name));
	box.name = name;
	box.dir = open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (box.dir < 0)
		die(MISSING, "cannot open %: %", str(name), why());
}

/* How many of n requests, from the first one, go to the same origin. */
static size_t
count_together(const struct request *q, size_t n)
{
	size_t mark = used, m = 1;

	while (m < n && same_origin(q[0].url, q[m].url))
		m++;
	used = mark;
	return m;
}

/*
 * The response to a request was lost. The server may have acted on the
 * request, so it is sent again at most RESENDS times, never if `once` is set;
 * after a pause if the connection was new.
 */
static void
response_lost(struct request *q, bool new_connection)
{
	if (q->once || ++q->lost > RESENDS || (new_connection &&
	    !pause_for("waiting to connect again", 1000 << (q->lost - 1))))
		die(CA_DOWN, "the connection to % ended before a response",
		    str(conn.host));
}

/*
 * Send n requests and receive their responses, or end the step. If a server
 * ends a connection before it has answered all requests, they are sent one by
 * one from then on; but an idle one on which no response came may have been
 * closed for other reasons.
 */
static void
exchange(struct request *q, struct response *r, size_t n)
{
	static size_t window = WINDOW;
	size_t done = 0;

	if (boxed) {
		box_batch(q, r, n);
		return;
	}
	while (done < n) {
		bool idle = conn.fd >= 0;
		size_t want = count_together(q + done,
		    n - done < window ? n - done : window);
		size_t got = pipeline(q + done, r + done, want);

		done += got;
		if (got == want)
			continue;
		response_lost(&q[done], !idle && want == 1);
		if (got > 0 || !idle)
			window = 1;
	}
}

/* ----------------------------------------------------- 29. Identifiers -- */

/* Printable ASCII without spaces: one field of a line of a record. */
static bool
is_word(Str s)
{
	for (size_t i = 0; i < s.n; i++)
		if (s.p[i] <= ' ' || s.p[i] >= 0x7f)
			return false;
	return s.n > 0 && s.n <= WORD;
}

/* Can a text be on one line of a record, without control characters? */
static bool
is_line(Str s)
{
	while (s.n && harmless(s))
		s = from(s, harmless(s));
	return s.n == 0;
}

static bool
is_nonce(Str s)
{
	return is_b64(s) && s.n <= NONCE;
}

/*
 * A DNS name, perhaps with a wildcard, or an IP address as text. The last
 * label of a name is not a number (RFC 1123 2.1): 192.0.2.256 is neither.
 */
static bool
is_name(Str type, Str s)
{
	Str label = NONE;

	if (is_ip(type))
		return made_of(s, DIGIT "abcdefABCDEF:.") &&
		    ip_bytes(s).n > 0;
	if (!is(type, "dns") || s.n > HOSTNAME)
		return false;
	if (begins(s, "*."))
		s = from(s, 2);
	if (!made_of(s, ALPHA DIGIT "-._"))
		return false;
	while (s.n) {
		label = cut(&s, '.');
		if (label.n == 0 || label.n > 63 || label.p[0] == '-' ||
		    label.p[label.n - 1] == '-')
			return false;
	}
	return !made_of(label, DIGIT);
}

static bool
is_identifier(Str s)
{
	Str type = cut(&s, ' ');

	return is_name(type, s);
}

/* The canonical form of an identifier: case and spelling do not matter. */
static struct identifier
canonical(Str type, Str value)
{
	Str ip = is_ip(type) ? ip_bytes(value) : NONE;

	return (struct identifier){ type, ip.n ? ip_text(ip) : lower(value) };
}

/* TYPE VALUE */
static void
read_identifier(Str s, void *to)
{
	Str type = cut(&s, ' ');

	*(struct identifier *)to = canonical(type, s);
}

static Str
identifier_text(const void *place)
{
	const struct identifier *id = place;

	return id->type.n ? text("% %", id->type, id->value) : NONE;
}

static bool
same_identifier(const struct identifier *a, const struct identifier *b)
{
	return same(a->value, b->value) && same(a->type, b->type);
}

/* A set of identifiers, numbered in the order in which they were added. */
struct identifiers {
	struct identifier id[NAMES];
	size_t n;
	unsigned short slot[SLOTS];	/* 1 + a number, 0 if free */
};

/*
 * The slot of an identifier, or the free slot where it belongs. With names
 * made to collide, the search is as slow as that of a list.
 */
static unsigned short *
find_slot(struct identifiers *all, const struct identifier *id)
{
	size_t at = 0;

	for (size_t i = 0; i < id->value.n; i++)
		at = (at * 31 + id->value.p[i]) % SLOTS;
	while (all->slot[at] &&
	    !same_identifier(&all->id[all->slot[at] - 1], id))
		at = (at + 1) % SLOTS;
	return &all->slot[at];
}

/* The number of an identifier; it is added if it is not there. */
static size_t
add_identifier(struct identifiers *all, const struct identifier *id)
{
	unsigned short *slot = find_slot(all, id);

	if (!*slot) {
		if (all->n == NAMES)
			die(FAULT, "more than % names", num(NAMES));
		all->id[all->n++] = *id;
		*slot = (unsigned short)all->n;
	}
	return *slot - 1U;
}

/* ----------------------------------------------------------- 30. Order -- */

/* The states of an order (RFC 8555 7.1.6), each a bit of a set. */
enum { PENDING = 1, READY = 2, PROCESSING = 4, VALID = 8, INVALID = 16 };

static const char statuses[][11] = {		/* in the same order */
	"pending", "ready", "processing", "valid", "invalid"
};

/* A status as a bit; 0 if an order cannot have it. */
static unsigned
status_bit(Str s)
{
	for (unsigned i = 0; i < COUNT(statuses); i++)
		if (is(s, statuses[i]))
			return 1U << i;
	return 0;
}

static bool
is_status(Str s)
{
	return status_bit(s) != 0;
}

static void
read_status(Str s, void *to)
{
	*(unsigned *)to = status_bit(s);
}

static Str
status_text(const void *place)
{
	for (unsigned i = 0; i < COUNT(statuses); i++)
		if (*(const unsigned *)place == 1U << i)
			return str(statuses[i]);
	return NONE;
}

/* What a challenge type publishes. */
enum publication {
	FILE_TOKEN = 1,		/* NAME, the token, is a file name */
	CERT_DIGEST,		/* NAME is for SNI, CONTENT in hexadecimal */
	TXT_RECORD		/* NAME is the record's */
};

/* A challenge (RFC 8555 8), as the CA describes it or a record has it. */
struct challenge {
	Str type;
	struct identifier id;
	Str url, name, content;
	Str token;		/* NONE if this step has not read it */
	Str status, error;	/* what the CA says; error is JSON */
	Str object;		/* all that the CA says, JSON */
};

/* Challenge types; the table is in section 48. */
static const struct challenge_type {
	char type[15];
	/* NAME and CONTENT, made from what the CA sent. */
	Str (*name)(const struct challenge *);
	Str (*content)(const struct challenge *);
	enum publication publishes;
	bool has_token;		/* RFC 8555 8 */
	bool stays;		/* what it publishes is not removed */
	const struct responder *responder;	/* for -l */
	void (*look)(const struct challenge *);	/* for -c */
} challenge_types[5];

/* NULL if the type is unknown. */
static const struct challenge_type *
find_challenge_type(Str type)
{
	for (size_t i = 0; i < COUNT(challenge_types); i++)
		if (is(type, challenge_types[i].type))
			return &challenge_types[i];
	return NULL;
}

static bool
publishes(const struct challenge *c, enum publication what)
{
	const struct challenge_type *t = find_challenge_type(c->type);

	return t && t->publishes == what;
}

/* TYPE IDTYPE IDENTIFIER URL NAME CONTENT; the last may hold spaces. */
static void
read_challenge(Str s, void *to)
{
	struct challenge *c = to;
	Str type = cut(&s, ' '), id_type = cut(&s, ' '), id = cut(&s, ' ');

	*c = (struct challenge){ .type = type, .id = canonical(id_type, id) };
	c->url = cut(&s, ' ');
	c->name = cut(&s, ' ');
	c->content = s;
}

static Str
challenge_text(const void *place)
{
	const struct challenge *c = place;

	return text("% % % % % %", c->type, c->id.type, c->id.value, c->url,
	    c->name, c->content);
}

/*
 * A name that becomes a file name must be a token (RFC 8555 8.3): then it
 * cannot be a path.
 */
static bool
is_challenge(Str s)
{
	struct challenge c;

	read_challenge(s, &c);
	return is_word(c.type) && is_name(c.id.type, c.id.value) &&
	    is_url(c.url) && is_word(c.name) && c.name.n <= HOSTNAME &&
	    c.content.n > 0 && c.content.n <= WORD &&
	    (!publishes(&c, FILE_TOKEN) ||
	    (is_b64(c.name) && c.name.n <= TOKEN)) &&
	    (!publishes(&c, CERT_DIGEST) ||
	    (made_of(c.content, HEX) && c.content.n == 64));
}

/* An authorization (RFC 8555 7.1.4). Only its URL is in a record. */
struct authorization {
	Str url;
	struct identifier id;	/* this and the rest: as the CA says */
	Str status;		/* NONE if it was not fetched */
	bool settled;		/* it is no longer pending */
	long retry_after;	/* of the response; seconds, or -1 */
	struct challenge *challenge;	/* NULL: it has no such member */
	size_t nchallenge;
};

/*
 * If the URL in this place has not changed, what is known of the
 * authorization stays.
 */
static void
read_authorization(Str s, void *to)
{
	struct authorization *a = to;

	if (!same(a->url, s))
		*a = (struct authorization){ .url = NONE };
	a->url = s;
}

/*
 * What one step knows and the next one needs: all that flows through a
 * pipe. It is read from a record and written as one by the keywords below.
 */
static struct order {
	Str directory, new_nonce, nonce;
	Str origin[ORIGINS];
	Str account, account_status, contact[LISTED];
	Str url, expires, finalize, certificate, profile, replaces;
	unsigned status;		/* a bit; 0 if it is not known */
	struct identifier identifier[NAMES];
	struct authorization authorization[NAMES];
	struct challenge challenge[CHALLENGES];
	Str rest[OTHERS];	/* lines with other keywords, as they came */
	size_t norigin, ncontact, nidentifier, nauthorization, nchallenge,
	    nrest;
} order;

/* `for each(p, list)` moves p through a list of the order. */
#define each(p, list) \
    (p = order.list; p < order.list + order.n##list; p++)

#define AT(field)    offsetof(struct order, field)
#define FIELD(field) AT(field), sizeof order.field, 1, 0
#define MANY(field)  AT(field), sizeof order.field[0], \
    COUNT(order.field), AT(n##field)

/* The lines that a record can have, in their order. */
static const struct keyword {
	char word[16];
	bool (*ok)(Str);	/* can this be its value? */
	unsigned to;		/* in struct order: its first place */
	unsigned short size, places;
	unsigned n;		/* where they are counted; 0: one place */
	bool of_account;	/* used from an account record, written early */
	void (*read)(Str, void *);	/* NULL for a Str */
	Str (*write)(const void *);	/* NULL for what begins with its Str */
} keywords[] = {
	{ "directory", is_url, FIELD(directory), true, NULL, NULL },
	{ "new-nonce", is_url, FIELD(new_nonce), true, NULL, NULL },
	{ "origin", is_url, MANY(origin), true, NULL, NULL },
	{ "account", is_url, FIELD(account), true, NULL, NULL },
	{ "nonce", is_nonce, FIELD(nonce), false, NULL, NULL },
	{ "account-status", is_word, FIELD(account_status), false, NULL, NULL },
	{ "contact", is_word, MANY(contact), false, NULL, NULL },
	{ "order", is_url, FIELD(url), false, NULL, NULL },
	{ "status", is_status, FIELD(status), false, read_status, status_text },
	{ "expires", is_word, FIELD(expires), false, NULL, NULL },
	{ "identifier", is_identifier, MANY(identifier), false, read_identifier,
	    identifier_text },
	{ "authorization", is_url, MANY(authorization), false,
	    read_authorization, NULL },
	{ "finalize", is_url, FIELD(finalize), false, NULL, NULL },
	{ "certificate", is_url, FIELD(certificate), false, NULL, NULL },
	{ "profile", is_word, FIELD(profile), false, NULL, NULL },
	{ "replaces", is_word, FIELD(replaces), false, NULL, NULL },
	{ "challenge", is_challenge, MANY(challenge), false, read_challenge,
	    challenge_text },
};

static const struct keyword *
keyword(Str word)
{
	for (size_t i = 0; i < COUNT(keywords); i++)
		if (is(word, keywords[i].word))
			return &keywords[i];
	return NULL;
}

/* The number of values of a keyword that can have several. */
static size_t *
count_of(const struct keyword *k)
{
	return (size_t *)(void *)((char *)&order + k->n);
}

/* The i-th value of a keyword; NONE if there is none. */
static Str
value_of(const struct keyword *k, size_t i)
{
	const void *place = (const char *)&order + k->to + i * k->size;

	if (k->n && i >= *count_of(k))
		return NONE;
	return k->write ? k->write(place) : *(const Str *)place;
}

/* Set the value of a keyword, or add it to its list. It has been checked. */
static void
set_value(const struct keyword *k, Str value)
{
	size_t at = k->n ? *count_of(k) : 0;
	void *to = (char *)&order + k->to + at * k->size;

	if (at == k->places)
		die(FAULT, "more than % '%' lines", num(k->places),
		    str(k->word));
	if (k->read)
		k->read(value, to);
	else
		*(Str *)to = value;
	if (k->n)
		++*count_of(k);
}

/* Add a line with an unknown keyword. */
static void
add_other(Str all)
{
	if (order.nrest == OTHERS)
		die(FAULT, "more than % lines with unknown keywords",
		    num(OTHERS));
	order.rest[order.nrest++] = all;
}

/* The identifiers of the order, each once. */
static struct identifiers *
identifiers(void)
{
	static struct identifiers all;
	static size_t seen;

	while (seen < order.nidentifier)
		add_identifier(&all, &order.identifier[seen++]);
	return &all;
}

/* Is an identifier one of those of the order? */
static bool
has_identifier(const struct identifier *id)
{
	return *find_slot(identifiers(), id) != 0;
}

/*
 * The URL that the directory was read from in this step, after a redirect.
 * If that is NONE, new-nonce is known from the record; the step that wrote it
 * has compared it with that URL.
 */
static Str directory_url;

static Str
ca_url(void)
{
	return directory_url.n ? directory_url : order.new_nonce;
}

/* Does an `origin` line, which only the user writes, allow a URL? */
static bool
is_allowed(Str url)
{
	Str *o;

	for each(o, origin)
		if (same_origin(url, *o))
			return true;
	return false;
}

/*
 * Does a URL have the origin of the CA, or one that the user allows? A CA
 * must not make us sign a request to another CA, where the same key may have
 * an account.
 */
static bool
is_own(Str url)
{
	size_t mark = used;
	bool own = same_origin(url, ca_url()) || is_allowed(url);

	used = mark;
	return own;
}

/* End the step if a URL from the CA is not its own. */
static void
need_own(Str url)
{
	if (!is_own(url))
		die(BROKEN, "the CA at % names a URL of another origin, %: %",
		    origin(ca_url()), origin(url), brief(url));
}

/*
 * Set a keyword to a value from the server at url, or add that to its list.
 * What cannot be in a record, or is a URL of others (need_own), ends the step.
 */
static void
put(const char *word, Str value, Str url)
{
	const struct keyword *k = keyword(str(word));

	if (!k->ok(value))
		die(BROKEN, "the response from % has an invalid %: %", url,
		    str(word), brief(value));
	if (k->ok == is_url)
		need_own(value);
	set_value(k, value);
}

/* ---------------------------------------------------------- 31. Record -- */

/* An earlier step failed: pass its failed line on and exit with its status. */
static void
pass_failure(Str value)
{
	Str code = cut(&value, ' '), name = cut(&value, ' ');
	unsigned long status;

	if (!number(code, 255, &status) || status == 0)
		die(BAD, "malformed 'failed' line");
	finish((int)status);
	if (begin_failed_line((int)status, name)) {
		line_add(value);
		line_end();
	}
	leave((int)status);
}

/* Does a keyword have this value? */
static bool
has_value(const struct keyword *k, Str value)
{
	for (size_t i = 0; i < (k->n ? *count_of(k) : 1); i++)
		if (same(value_of(k, i), value))
			return true;
	return false;
}

/* Add a line of a record. Returns what is wrong with it, or NONE. */
static Str
take_line(Str all, bool account_only)
{
	Str value = all, word = cut(&value, ' ');
	const struct keyword *k = keyword(word);

	if (!is_line(all))
		return S("control character or malformed text");
	if (!is_b64(word))
		return S("does not begin with a keyword");
	if (account_only && !(k && k->of_account))
		return NONE;
	if (is(word, "end") || is(word, "failed") || (k && !k->ok(value)))
		return text("malformed '%' value", word);
	if (account_only && has_value(k, value))
		return NONE;
	if (!k)			/* it passes through as it is */
		add_other(all);
	else if (k->n || !value_of(k, 0).n)
		set_value(k, value);
	else
		return account_only ?
		    text("'%' differs from the record on standard input",
		    word) : text("a second '%' line", word);
	return NONE;
}

/* What kind of file it is that is not a record, or NULL. */
static const char *
not_a_record(Str s)
{
	static const char kind[][2][25] = {
		{ "CERTIFICATE REQUEST-----", "a certificate request" },
		{ "PRIVATE KEY-----", "a key" },
		{ "CERTIFICATE-----", "a certificate" },
		{ "-----", "a PEM file" }
	};
	Str label = NONE, l;

	if (s.n > 1 && s.p[0] == 0x30 && s.p[1] >= 0x80)
		return "a DER file";
	while (s.n && !label.n) {
		l = cut(&s, '\n');
		label = pem_label(trim(cut(&l, '\r')), S("-----BEGIN "));
	}
	for (size_t i = 0; label.n && i < COUNT(kind); i++)
		if (contains(cat(NONE, label, S("-----")), str(kind[i][0])))
			return kind[i][1];
	return NULL;
}

/* End the step if another kind of file was given as a record. */
static void
check_kind(Str s, const char *file, bool account_only)
{
	const char *kind = not_a_record(s);

	if (kind)
		die(BAD, "% is %, not a record%", file_name(file), str(kind),
		    account_only ? S("; -a takes the output of new-account, "
		    "-k the key") : S("; the output of the step before, such "
		    "as new-order, is one"));
}

/*
 * Read a record, the content of a file. Of an account record (-a) only the
 * of_account keywords are used; those with one value must not differ from the
 * record on standard input. The line "end" proves that a record is complete:
 * a step that is killed while it writes leaves a part of one in the pipe, and
 * its last line may be cut.
 */
static void
record_read(Str rest, const char *file, bool account_only)
{
	Str all, value;
	bool whole = rest.n && rest.p[rest.n - 1] == '\n', ended = false;
	Str fault;

	if (rest.n == 0)
		die(BAD, "% is empty", file_name(file));
	check_kind(rest, file, account_only);
	for (size_t n = 1; rest.n; n++) {
		all = value = cut(&rest, '\n');
		if (is(cut(&value, ' '), "failed") && is_line(all) &&
		    (rest.n || whole || contains(value, S(" "))))
			pass_failure(value);
		if (is(all, "end")) {
			ended = true;
			continue;
		}
		fault = take_line(all, account_only);
		if (fault.n && (rest.n || whole || ended))
			die(BAD, "%, line %: %", file_name(file), num(n),
			    fault);
	}
	if (!ended)
		die(BAD, "% is cut off: it has no 'end' line; run % again",
		    file_name(file), account_only ? S("new-account") :
		    S("the step that wrote it"));
}

static Str early_lines;		/* of the record, that have been written */

/* Add the lines of a keyword that have not been written yet. */
static void
add_lines(struct list *all, const struct keyword *k)
{
	Str value, s;

	for (size_t i = 0; (value = value_of(k, i)).n; i++) {
		s = text("% %\n", str(k->word), value);
		if (!contains(early_lines, s))
			list_add(all, "", s);
		if (!k->n)
			break;
	}
}

/* The order as a record, without the line "end" and the early lines. */
static Str
record_text(void)
{
	struct list all = text_begin();
	Str *other;

	for (size_t k = 0; k < COUNT(keywords); k++)
		add_lines(&all, &keywords[k]);
	for each(other, rest)
		list_add(&all, "", text("%\n", *other));
	return list_text(&all);
}

/* The value of a keyword, without which the step ends. */
static Str
need(const char *word)
{
	Str s = value_of(keyword(str(word)), 0);

	if (!s.n)
		die(BAD, "the record has no '%' line", str(word));
	return s;
}

/*
 * The steps of a pipeline run at the same time, and to connect takes three
 * round trips. So a step whose record goes to a pipe writes at once what it
 * knows of where the CA is, and a step that has read that connects while it
 * waits for the rest of its record.
 */

/*
 * Write lines of the record early, if the output is a pipe that has room for
 * them. If it has not, or has no reader, all is written at the end.
 */
static void
write_early(Str lines)
{
	struct pollfd p = { 1, POLLOUT, 0 };
	struct stat st;

	if (!on_record_pipe || out.fd != 1 || boxed || early_lines.n ||
	    !lines.n || lines.n > PIPE_BUF || fstat(1, &st) != 0 ||
	    !S_ISFIFO(st.st_mode) || poll(&p, 1, 0) != 1 ||
	    p.revents != POLLOUT)
		return;
	if (write_all(1, lines))
		early_lines = lines;
}

/* The lines of the record that say where the CA is. */
static Str
known_lines(void)
{
	struct list all = text_begin();

	for (size_t k = 0; k < COUNT(keywords); k++)
		if (keywords[k].of_account)
			add_lines(&all, &keywords[k]);
	return list_text(&all);
}

/*
 * Look at the beginning of a record, s, whose end is still to come: if it has
 * the lines that say where the CA is, pass them on and connect.
 */
static void
look_early(Str s)
{
	static bool done;
	size_t mark = used;
	Str rest = s, at = NONE, all, value;
	const struct keyword *k;
	struct url u;

	if (done || boxed || proxy_command || !s.n || s.p[s.n - 1] != '\n')
		return;
	done = true;
	while (rest.n) {
		all = value = cut(&rest, '\n');
		k = keyword(cut(&value, ' '));
		if (!k || !k->of_account || !is_line(all) || !k->ok(value))
			return;
		if (is(str(k->word), "directory") ||
		    is(str(k->word), "new-nonce"))
			at = value;
	}
	write_early(s);
	if (url_read(at, &u))
		connect_early(&u);
	used = mark;
}

/* -------------------------------------------------------- 32. Problems -- */

static const char *account_file;	/* the account's key, -k */
static const char *account_record;	/* -a, or NULL */
static bool have_account_key;

/* The body of a response, which must be a JSON object. */
static Str
json_body(const struct response *r)
{
	Str v;

	if (!json_read(r->body, &v))
		broken(r, "is not JSON");
	if (json_kind(v) != '{')
		broken(r, "is not a JSON object");
	return v;
}

/* A member of the given kind; NONE if it is absent. */
static Str
member(const struct response *r, Str o, const char *name, int kind)
{
	Str v = json_member(o, name);

	if (v.n && json_kind(v) != kind)
		broken(r, "has a member of the wrong type: %", str(name));
	return v.n && kind == '"' ? json_text(v) : v;
}

static Str
need_member(const struct response *r, Str o, const char *name, int kind)
{
	Str v = member(r, o, name, kind);

	if (!v.n)
		broken(r, "lacks the member %", str(name));
	return v;
}

#define ERROR "urn:ietf:params:acme:error:"

/* What the user can do about a problem, by its type. */
static const struct {
	char type[24], hint[69];
} hints[] = {
	{ "externalAccountRequired", "; the CA requires external account "
	    "binding; use new-account -e FILE" },
	{ "badSignatureAlgorithm", "; try another key type (key -t)" },
};

static Str directory_body;	/* JSON, once it has been fetched */
static bool key_alone;		/* no account signs: revoke-cert -K */

/*
 * Does the problem mean that the CA does not know the account, or that
 * another key signed? The signature of an external account binding is another
 * matter.
 */
static bool
is_about_key(Str type, Str detail)
{
	detail = lower(detail);
	return is(type, ERROR "accountDoesNotExist") ||
	    (contains(detail, S("jws verification error")) &&
	    !contains(detail, S("external account")));
}

/*
 * A remedy if the key is perhaps not the account's, or if there is no account
 * yet.
 */
static Str
key_account_hint(Str type)
{
	const char *file = account_record;
	bool lost = is(type, ERROR "accountDoesNotExist");

	if (!order.account.n)
		return lost ? S("; run new-account first") : NONE;
	return text("; is % (-k) the key of %?%", file_name(account_file),
	    file ? text("% (-a)", file_name(file)) : text("the account in "
	    "the record, %", order.account),
	    lost ? S(" If so, run new-account again") : NONE);
}

/*
 * A remedy for a problem, or NONE. Boulder reports an account that has not
 * agreed to the terms of service as malformed.
 */
static Str
problem_hint(Str type, Str detail)
{
	Str terms = text_of(json_member(directory_body, "meta"),
	    "termsOfService");

	if (is(type, ERROR "userActionRequired") ||
	    (is(type, ERROR "malformed") &&
	    contains(lower(detail), S("agree to terms"))))
		return cat(NONE, S("; agree to its terms of service with "
		    "new-account -y"), terms.n ? S(": ") : NONE, brief(terms));
	if (!key_alone && is_about_key(type, detail))
		return key_account_hint(type);
	for (size_t i = 0; i < COUNT(hints) && !key_alone; i++)
		if (same(type, text(ERROR "%", str(hints[i].type))))
			return str(hints[i].hint);
	return NONE;
}

/*
 * The key type for a signature algorithm, for a message; NONE if we have
 * none.
 */
static Str
key_hint(Str alg)
{
	for (size_t i = 0; i < COUNT(key_types); i++)
		if (same(alg, str(key_types[i].alg)))
			return text(" (key -t %)", str(key_types[i].name));
	return NONE;
}

/*
 * The subproblems of a problem, and the algorithms that the CA accepts (RFC
 * 8555 6.2).
 */
static Str
problem_list(Str o)
{
	Str subs = list_of(o, "subproblems"), list = list_of(o, "algorithms");
	struct list all = list_begin();
	Str none, sub, id, value;

	while (json_each(&subs, &none, &sub)) {
		id = json_member(sub, "identifier");
		list_add(&all, "; ", text("%: %: %",
		    brief(text_of(id, "value")), brief(text_of(sub, "type")),
		    brief(text_of(sub, "detail"))));
	}
	while (json_each(&list, &none, &value))
		if (json_kind(value) == '"')
			list_add(&all, "; ", cat(NONE, S("the CA accepts "),
			    brief(json_text(value)),
			    key_hint(json_text(value))));
	return list_text(&all);
}

/* A problem document on one line (RFC 7807 3.1, RFC 8555 6.7 and 6.7.1). */
static Str
problem_text(Str o)
{
	Str type = text_of(o, "type"), detail = text_of(o, "detail");
	Str list = problem_list(o), s;

	s = cat(NONE, type.n ? brief(type) : S("a problem without a type"),
	    detail.n ? S(": ") : NONE, shorten(detail, DETAIL),
	    list.n ? S("; ") : NONE, list);
	return cat(NONE, s, problem_hint(type, detail));
}

/* The problem in a response, or its HTTP status if it has none. */
static Str
problem(const struct response *r)
{
	Str v;

	if (json_read(r->body, &v) && json_kind(v) == '{' &&
	    (json_member(v, "type").n || json_member(v, "detail").n))
		return problem_text(v);
	return text("HTTP status %", num((unsigned)r->status));
}

static bool
has_type(const struct response *r, const char *type)
{
	Str v;

	return r->status >= 400 && json_read(r->body, &v) &&
	    same(text_of(v, "type"), cat(S(ERROR), str(type)));
}

/* End the step: try again later, after `seconds` if not negative. */
static void
come_back(const struct response *r, long seconds)
{
	if (seconds >= 0)
		remedy = cat(NONE, text("; try again after % s",
		    num((unsigned long)seconds)), remedy);
	die(LATER, "%: %", brief(r->url), problem(r));
}

/* End the step if a response is not a success. */
static void
accept_response(const struct response *r)
{
	if (r->status >= 200 && r->status < 300)
		return;
	if (r->status == 429 || has_type(r, "rateLimited"))
		come_back(r, r->retry_after);
	if (r->status < 400)
		broken(r, "is a redirect, which is followed only once and only "
		    "for the directory");
	die(r->status < 500 || r->status == 501 ? REFUSED : CA_DOWN, "%: %",
	    brief(r->url), problem(r));
}

/* -------------------------------------------- 33. Directory and nonces -- */

/* The history of a request. */
struct attempt {
	size_t post;		/* which of a batch it is */
	int lost;		/* responses that were lost */
	int errors;		/* server errors (5xx) without Retry-After */
	int missing;		/* 404 for a new object */
	bool done;
};

/*
 * How many ms to wait before a request is sent again; -1 if its response is
 * final. `made`: this or the previous step may have created the object, so
 * that some servers of the CA may not know it yet.
 */
static long long
retry_pause(const struct response *r, struct attempt *a, bool made)
{
	long wait = r->retry_after;

	if (r->status == 404 && made && !boxed && a->missing++ < LAG)
		return 1000;
	if (r->status == 501 || (r->status < 500 && r->status != 429))
		return -1;
	if (wait >= 0)
		return wait ? wait * 1000LL : 1000;
	if (r->status == 429 || ++a->errors == TRIES)
		return -1;
	return 1000 << (a->errors - 1);
}

/*
 * Wait before a request is sent again; ends the step if too little time is
 * left.
 */
static void
pause_after(const struct response *r, long long ms)
{
	if (pause_for(r->retry_after < 0 ? "waiting for the CA to recover" :
	    "pausing at the CA's request", ms))
		return;
	if (r->retry_after >= 0)
		come_back(r, r->retry_after);
	accept_response(r);
}

/*
 * Make a reference in a response absolute (RFC 3986 5.2, as far as ACME needs
 * it).
 */
static Str
absolute(Str base, Str ref)
{
	struct url u;

	if (!begins(ref, "/") || !url_read(base, &u))
		return ref;
	return begins(ref, "//") ? text("https:%", ref) :
	    cat(NONE, u.origin, ref);
}

/* The state of a walk through the Link headers of a response. */
struct links {
	const struct response *response;
	Str head, value;	/* what is still to be read */
};

static struct links
begin_links(const struct response *r)
{
	return (struct links){ r, r->head, NONE };
}

/* Is a relation among the parameters of a link (RFC 8288 3)? */
static bool
has_relation(Str params, Str relation)
{
	bool found = false;
	Str name, value;

	while (params.n) {
		value = cut_unquoted(&params, ';');
		name = trim(cut(&value, '='));
		value = trim(value);
		if (value.n > 1 && value.p[0] == '"')
			value = (Str){ value.p + 1, value.n - 2 };
		while (same_nocase(name, S("rel")) && value.n)
			found |= same_nocase(cut(&value, ' '), relation);
	}
	return found;
}

/*
 * The next absolute URL of a relation in the Link headers (RFC 8288 3); NONE
 * after the last one.
 */
static Str
next_link(struct links *l, Str relation)
{
	while (l->value.n || next_field(&l->head, S("Link"), &l->value)) {
		Str url;

		cut(&l->value, '<');
		url = cut(&l->value, '>');
		if (!has_relation(cut_unquoted(&l->value, ','), relation))
			continue;
		url = absolute(l->response->url, url);
		if (!is_url(url))
			broken(l->response, "has a link that is not an https "
			    "URL: %",
			    brief(url));
		return url;
	}
	return NONE;
}

/* The Location that a response must have. */
static Str
location(const struct response *r)
{
	Str url = absolute(r->url, r->location);

	if (!is_url(url))
		broken(r, "has no Location with an https URL");
	return url;
}

/* Nonces that no request has spent (RFC 8555 6.5). */
static struct {
	unsigned char b[NONCE];
	size_t n;
} nonce[WINDOW];
static size_t nnonce;

static void
nonce_put(Str s)
{
	if (!s.n || nnonce == WINDOW)
		return;
	memcpy(nonce[nnonce].b, s.p, s.n);
	nonce[nnonce++].n = s.n;
}

static Str
nonce_take(void)
{
	nnonce--;
	return cat(NONE, (Str){ nonce[nnonce].b, nonce[nnonce].n });
}

/* A request for a nonce (RFC 8555 7.2). */
static struct request
nonce_request(void)
{
	return (struct request){ .method = "HEAD", .url = order.new_nonce };
}

/*
 * Send an unsigned request, which may be repeated. If a nonce will be needed,
 * and it is known where to get one, a request for that goes with it.
 */
static struct response
fetch(Str url, bool with_nonce)
{
	struct request q[] = { { .method = "GET", .url = url },
	    nonce_request() };
	struct attempt a = { .post = 0 };
	struct response r[2];
	size_t n = with_nonce && have_account_key && !nnonce &&
	    order.new_nonce.n ? 2 : 1;
	long long pause;

	for (size_t mark = used; ; used = mark) {
		exchange(q, r, n);
		if (n == 2)
			nonce_put(r[1].nonce);
		n = 1;
		if ((pause = retry_pause(r, &a, false)) < 0)
			return r[0];
		pause_after(r, pause);
	}
}

static struct response directory_response;

/* End the step: the URL of the directory leads to something else. */
static void
no_directory(Str cause)
{
	die(CONFIG, "% is not an ACME directory: %; correct -d or "
	    "ACME_DIRECTORY", need("directory"), cause);
}

/*
 * Does a response mean that the URL of the directory is wrong? It is public:
 * any redirect or client error does, unless the CA limits or refuses clients.
 */
static bool
is_wrong_url(const struct response *r)
{
	return r->status >= 300 && r->status < 500 && r->status != 401 &&
	    r->status != 403 && r->status != 429 && !has_type(r, "rateLimited");
}

/* The JSON object in the response for the directory. */
static Str
directory_object(const struct response *r)
{
	Str o;

	if (is_wrong_url(r))
		no_directory(text("HTTP status %", num((unsigned)r->status)));
	accept_response(r);
	if (!json_read(r->body, &o) || json_kind(o) != '{')
		no_directory(S("its content is not a JSON object"));
	if (!text_of(o, "newNonce").n)
		no_directory(S("it has no newNonce"));
	return o;
}

/*
 * The directory (RFC 8555 7.1.1), fetched once. Only it may be reached
 * through a redirect, and only through one.
 */
static Str
directory(void)
{
	struct response *r = &directory_response;
	Str url = need("directory");

	if (directory_body.n)
		return directory_body;
	*r = fetch(url, true);
	if (r->status > 300 && r->status < 309 && r->location.n) {
		url = absolute(url, r->location);
		if (!is_url(url))
			no_directory(text("it redirects to something other "
			    "than an https URL: %", brief(url)));
		*r = fetch(url, false);
	}
	directory_body = directory_object(r);
	directory_url = r->url;
	return directory_body;
}

/*
 * A URL from the directory; NONE if the CA does not offer it. Only
 * renewalInfo may have another origin: its requests are not signed (RFC 9773
 * 4.1).
 */
static Str
endpoint(const char *name)
{
	Str o = directory(), url = member(&directory_response, o, name, '"');

	url = absolute(directory_response.url, url);
	if (url.n && !is_url(url))
		broken(&directory_response, "has no https URL for %: %",
		    str(name), brief(url));
	if (url.n && strcmp(name, "renewalInfo") != 0)
		need_own(url);
	return url;
}

static Str
need_endpoint(const char *name)
{
	Str url = endpoint(name);

	if (!url.n && begins(str(name), "new") &&
	    strcmp(name, "newAuthz") != 0)
		broken(&directory_response, "lacks %", str(name));
	if (!url.n)
		die(REFUSED, "the CA does not offer %", str(name));
	return url;
}

/*
 * A directory may redirect to that of another CA. Orders can go there, but
 * accounts and authorizations there are changed only if the user names that
 * CA.
 */
static void
refuse_redirected(void)
{
	Str url = order.directory;

	if (!same_origin(url, ca_url()) && !is_allowed(ca_url()))
		die(BROKEN, "the directory % redirects to another origin, %; "
		    "if that is your CA, name its directory with -d", url,
		    origin(ca_url()));
}

/* ------------------------------------------------- 34. Signed requests -- */

/* A request to be signed. Unless `jwk` is set, order.account is known then. */
struct post {
	Str url;
	Str payload;		/* NONE: POST-as-GET (RFC 8555 6.3) */
	const struct key *key;	/* NULL: the account's */
	bool jwk;		/* signed by a key, not an account: 6.2 */
	bool once;		/* not sent again, except for badNonce */
	bool made;		/* for a new object: see LAG */
};

/* The account key (-k), which is read when it is first needed. */
static const struct key *
signer(void)
{
	Str before = remedy;

	if (have_account_key)
		return &account_key;
	if (is_missing(account_file))
		remedy = text("; make one with acme-step key -o %, or name "
		    "yours with -k", file_name(account_file));
	key_read(&account_key, account_file);
	remedy = before;
	have_account_key = true;
	return &account_key;
}

/*
 * Fetch nonces for n requests, or for NONCES of them: each response brings
 * another one (RFC 8555 7.2, 6.5). Some servers return a nonce only for GET.
 * Returns for how many requests the nonces suffice.
 */
static size_t
nonce_fetch(size_t n)
{
	struct request q[NONCES] = { { .method = NULL } };
	struct response r[NONCES], last;
	size_t want = n < NONCES ? n : NONCES;
	size_t lack = want > nnonce ? want - nnonce : 0;

	for (size_t i = 0; i < lack; i++)
		q[i] = nonce_request();
	exchange(q, r, lack);
	for (size_t i = 0; i < lack; i++)
		nonce_put(r[i].nonce);
	while (nnonce == 0) {
		last = fetch(order.new_nonce, false);
		accept_response(&last);
		if (!last.nonce.n)
			broken(&last, "has no nonce");
		nonce_put(last.nonce);
	}
	return n < nnonce ? n : nnonce;
}

/* What is signed (RFC 7515 5.1): the protected header and the payload. */
static Str
jws_input(Str protected, Str payload)
{
	return text("%.%", b64(protected), b64(payload));
}

/* A JWS in flattened form (RFC 7515 7.2.2). */
static Str
jws(Str input, Str signature)
{
	Str payload = input, protected = cut(&payload, '.');

	return text("{\"protected\":\"%\",\"payload\":\"%\","
	    "\"signature\":\"%\"}", protected, payload, b64(signature));
}

/* The body of a signed request (RFC 8555 6.2). */
static Str
signed_text(const struct post *p)
{
	size_t mark = used;
	const struct key *k = p->key ? p->key : signer();
	Str input = jws_input(text("{\"alg\":\"%\",%,\"nonce\":\"%\","
	    "\"url\":%}", str(k->type->alg), p->jwk ?
	    with(NONE, "jwk", jwk(k)) :
	    with(NONE, "kid", quote(order.account)),
	    nonce_take(), quote(p->url)), p->payload);

	return keep(mark, jws(input, sign(k, input, false)));
}

/* retry_pause() for a signed request; badNonce needs no pause. */
static long long
post_pause(const struct post *p, const struct response *r, struct attempt *a)
{
	if (has_type(r, "badNonce"))
		return 0;
	return p->once ? -1 : retry_pause(r, a, p->made);
}

/*
 * Move what a response holds down to the top of the heap, and keep it there.
 */
static void
keep_response(struct response *r)
{
	Str *part[] = { &r->location, &r->nonce, &r->head, &r->body };
	size_t n = (size_t)(r->body.p + r->body.n - r->head.p);
	unsigned char *to = heap + used;
	const unsigned char *old = r->head.p;

	memmove(to, old, n);
	used += n;
	for (size_t i = 0; i < COUNT(part); i++)
		if (part[i]->n)
			part[i]->p = to + (part[i]->p - old);
	r->body.p = r->body.n ? r->body.p : to + n;
}

/* The next round brings a nonce more than it takes: see ask_to_validate. */
static bool want_nonce;

/*
 * Send as many of the requests in todo[] as there are nonces for. Final
 * responses are kept in r[], all other memory of the round is freed. The
 * other requests move to the front of todo[], after the pause that they need.
 * Returns how many are left. *stuck counts the rounds in a row in which every
 * nonce was refused.
 */
static size_t
acme_round(const struct post *p, struct response *r, struct attempt *todo,
    size_t n, int *stuck)
{
	struct request q[WINDOW + 1] = { { .method = NULL } };
	struct response got[WINDOW + 1], *slow = NULL;
	size_t mark = used, m = nonce_fetch(n < WINDOW ? n : WINDOW);
	size_t left = 0;
	long long pause, most = 0;

	for (size_t i = 0; i < m; i++) {
		const struct post *post = &p[todo[i].post];

		q[i] = (struct request){ "POST", post->url,
		    signed_text(post), post->once, todo[i].lost };
	}
	q[m] = nonce_request();
	exchange(q, got, m + want_nonce);
	if (want_nonce)
		nonce_put(got[m].nonce);
	want_nonce = false;
	++*stuck;
	for (size_t i = 0; i < m; i++) {
		struct attempt *a = &todo[i];

		nonce_put(got[i].nonce);
		a->lost = q[i].lost;
		pause = post_pause(&p[a->post], &got[i], a);
		a->done = pause < 0;
		if (pause != 0)
			*stuck = 0;
		if (pause > most) {
			slow = &got[i];
			most = pause;
		}
	}
	if (slow)
		pause_after(slow, most);
	else if (*stuck > REFUSALS &&
	    !pause_for("waiting for a nonce that the CA accepts", 250))
		accept_response(&got[0]);
	used = mark;
	for (size_t i = 0; i < n; i++)
		if (i < m && todo[i].done) {
			r[todo[i].post] = got[i];
			keep_response(&r[todo[i].post]);
		} else
			todo[left++] = todo[i];
	return left;
}

/*
 * The only way to send signed requests: sign and send n, up to NAMES + 1, and
 * return their responses in the same order, whatever their status. Nothing is
 * signed unless all URLs are the CA's own (see is_own). If a nonce is refused,
 * the request is sent again with a fresh one, until the time limit (RFC 8555
 * 6.5).
 */
static void
acme_batch(const struct post *p, struct response *r, size_t n)
{
	struct attempt todo[NAMES + 1];
	int stuck = 0;

	for (size_t i = 0; i < n; i++) {
		need_own(p[i].url);
		todo[i] = (struct attempt){ .post = i };
	}
	while (n > 0)
		n = acme_round(p, r, todo, n, &stuck);
}

/* Send one request; the step ends unless it succeeds. */
static struct response
acme_post(Str url, Str payload)
{
	struct post p = { .url = url, .payload = payload,
	    .made = !payload.n };
	struct response r;

	acme_batch(&p, &r, 1);
	accept_response(&r);
	return r;
}

/* -------------------------------------------------------- 35. Accounts -- */

/*
 * newAccount, signed by the key itself (RFC 8555 7.3); any response is
 * returned.
 */
static struct response
ask_account(const struct key *k, Str payload)
{
	struct post p = { .url = need_endpoint("newAccount"),
	    .payload = payload, .key = k, .jwk = true };
	struct response r;

	acme_batch(&p, &r, 1);
	return r;
}

/* Find the account of a key (RFC 8555 7.3.1); any response is returned. */
static struct response
find_account(const struct key *k)
{
	return ask_account(k, S("{\"onlyReturnExisting\":true}"));
}

/* Store the account of a response, which must be a success. */
static void
take_account(const struct response *r)
{
	accept_response(r);
	put("account", location(r), r->url);
}

/*
 * Make sure that the account URL is known: from a record, or by the key
 * (7.3.1).
 */
static void
need_account(void)
{
	struct response r;

	if (order.account.n)
		return;
	r = find_account(signer());
	take_account(&r);
}

/* Before the first request: find out where nonces come from. */
static void
acme_start(void)
{
	nonce_put(order.nonce);
	order.nonce = NONE;
	if (!order.new_nonce.n) {
		Str url = need_endpoint("newNonce");

		put("new-nonce", url, url);
	}
}

/* Print the record, with a fresh nonce for the next step, and more lines. */
static void
print_record_and(Str lines)
{
	if (nnonce)
		order.nonce = nonce_take();
	print(cat(NONE, record_text(), lines, S("end\n")));
}

static void
print_record(void)
{
	print_record_and(NONE);
}

/* End a step whose answer is no, and has been printed. */
static void
answer_no(void)
{
	conn_close();
	leave(NO);
}

/* -------------------------------------------------- 36. Authorizations -- */

/* The identifier in a response (RFC 8555 9.7.7). */
static struct identifier
identifier_in(const struct response *r, Str o)
{
	Str type = need_member(r, o, "type", '"');

	return canonical(type, need_member(r, o, "value", '"'));
}

/*
 * The identifiers of an order must be those of the record, in any order, even
 * repeated; a record without identifiers takes them over.
 */
static void
store_identifiers(const struct response *r, Str list)
{
	bool fill = order.nidentifier == 0, seen[NAMES] = { false };
	size_t n = 0, at;
	Str none, o;

	while (json_each(&list, &none, &o)) {
		struct identifier id = identifier_in(r, o);

		if (fill && !has_identifier(&id))
			put("identifier", identifier_text(&id), r->url);
		if (!has_identifier(&id))
			broken(r, "is an order with a name that was not "
			    "requested: %", brief(identifier_text(&id)));
		at = add_identifier(identifiers(), &id);
		n += !seen[at];
		seen[at] = true;
	}
	if (n < identifiers()->n)
		broken(r, "is an order that lacks requested names");
}

static void
store_url(const struct response *r, const char *word, Str value)
{
	put(word, absolute(r->url, value), r->url);
}

/* Store an order object in the record (RFC 8555 7.1.3). */
static void
order_store(const struct response *r)
{
	static const char words[][9] = { "expires", "profile", "replaces" };
	static const char urls[][12] = { "finalize", "certificate" };
	Str o = json_body(r), list, none, v;

	put("status", need_member(r, o, "status", '"'), r->url);
	for (size_t i = 0; i < COUNT(words); i++)
		if ((v = member(r, o, words[i], '"')).n)
			put(words[i], v, r->url);
	for (size_t i = 0; i < COUNT(urls); i++)
		if ((v = member(r, o, urls[i], '"')).n)
			store_url(r, urls[i], v);
	if (order.status & (PENDING | READY) && !order.finalize.n)
		broken(r, "lacks the member finalize");
	if ((list = member(r, o, "identifiers", '[')).n)
		store_identifiers(r, list);
	if (!(list = member(r, o, "authorizations", '[')).n)
		return;
	order.nauthorization = 0;
	while (json_each(&list, &none, &v)) {
		if (json_kind(v) != '"')
			broken(r, "has an authorization that is not a URL");
		if (order.nauthorization == NAMES)
			die(FAULT, "an order has more than % authorizations",
			    num(NAMES));
		store_url(r, "authorization", json_text(v));
	}
}

static void
order_refresh(void)
{
	struct response r = acme_post(need("order"), NONE);

	order_store(&r);
}

/*
 * The identifier of an authorization (RFC 8555 7.1.4), with "*." if it is for
 * a wildcard. It must be one of the order's: to publish what a CA asks for
 * another name would give away a right to that name.
 */
static struct identifier
authorized(const struct response *r, Str o)
{
	struct identifier id = identifier_in(r,
	    need_member(r, o, "identifier", '{'));
	struct identifier wild = id;
	bool is_wild = json_kind(json_member(o, "wildcard")) == 't';

	if (!is_name(id.type, id.value))
		broken(r, "is for an invalid name: %", brief(id.value));
	if (!begins(id.value, "*."))
		wild.value = text("*.%", id.value);
	if (!is_wild && has_identifier(&id))
		return id;
	/* Some CAs leave "wildcard" out. */
	if (!has_identifier(&wild))
		broken(r, "is an authorization for another name than the "
		    "order's: %", brief(is_wild ? wild.value : id.value));
	return wild;
}

/* The challenges of all authorizations, as the CA describes them. */
static struct challenge offered[CHALLENGES];
static size_t noffered;

static void
challenge_store(const struct response *r, Str o, struct authorization *a)
{
	Str error = json_member(o, "error");

	if (noffered == CHALLENGES)
		die(FAULT, "an order has more than % challenges",
		    num(CHALLENGES));
	offered[noffered++] = (struct challenge){
		.type = member(r, o, "type", '"'),
		.id = a->id,
		.url = absolute(r->url, text_of(o, "url")),
		.token = text_of(o, "token"),
		.status = member(r, o, "status", '"'),
		.error = json_kind(error) == '{' ? error : NONE,
		.object = o,
	};
	a->nchallenge++;
}

/*
 * Store an authorization object. A missing status counts as pending, so that
 * its challenges are tried.
 */
static void
authorization_store(const struct response *r, struct authorization *a)
{
	Str o = json_body(r), list = member(r, o, "challenges", '['), none, c;

	a->id = authorized(r, o);
	a->status = member(r, o, "status", '"');
	if (!a->status.n)
		a->status = S("pending");
	a->settled = !is(a->status, "pending");
	a->retry_after = r->retry_after;
	a->challenge = list.n ? offered + noffered : NULL;
	a->nchallenge = 0;
	while (json_each(&list, &none, &c))
		challenge_store(r, c, a);
}

/*
 * Fetch authorizations of the order. If the CA refuses one, the step ends;
 * with `some` that one has no status and no challenges instead.
 */
static void
fetch_each(struct authorization **list, size_t n, bool some)
{
	static struct post p[NAMES];
	static struct response r[NAMES];
	long long start = now_ms();

	for (size_t i = 0; i < n; i++)
		p[i] = (struct post){ .url = list[i]->url, .made = true };
	acme_batch(p, r, n);
	report_time = (now_ms() - start) * 3 / 2;
	noffered = 0;
	for (size_t i = 0; i < n; i++) {
		*list[i] = (struct authorization){ .url = list[i]->url };
		if (some && r[i].status != 200)
			continue;
		accept_response(&r[i]);
		authorization_store(&r[i], list[i]);
	}
}

static void
fetch_authorizations(bool some)
{
	static struct authorization *list[NAMES];

	need(order.nauthorization ? "identifier" : "order");
	for (size_t i = 0; i < order.nauthorization; i++)
		list[i] = &order.authorization[i];
	fetch_each(list, order.nauthorization, some);
}

/*
 * Fetch those authorizations that may still be pending. The others are valid:
 * a step does not wait if one has failed.
 */
static void
fetch_pending(void)
{
	static struct authorization *list[NAMES];
	struct authorization *a;
	size_t n = 0;

	for each(a, authorization)
		if (a->settled)
			*a = (struct authorization){ .url = a->url,
			    .status = S("valid"), .settled = true };
		else
			list[n++] = a;
	fetch_each(list, n, false);
}

static bool
is_pending(const struct authorization *a)
{
	return is(a->status, "pending");
}

/* An authorization that is neither pending nor valid is final (7.1.6). */
static bool
is_usable(const struct authorization *a)
{
	return is_pending(a) || is(a->status, "valid");
}

/*
 * Did validation of a challenge fail? If it is pending and has an error, it
 * did (some CAs leave it so); if it is processing, the CA is trying again
 * (RFC 8555 8.2).
 */
static bool
is_failed(const struct challenge *c)
{
	return is(c->status, "invalid") || (c->error.n &&
	    !is(c->status, "processing") && !is(c->status, "valid"));
}

/*
 * For the message about a failed challenge: the name of its TXT record, from
 * its challenge line, if any, since that can be an alias. NONE if it has no
 * TXT record, or if the message of the CA names it.
 */
static Str
txt_hint(const struct challenge *failed, Str seen)
{
	const struct challenge *c;
	Str name;

	if (!publishes(failed, TXT_RECORD))
		return NONE;
	name = find_challenge_type(failed->type)->name(failed);
	for each(c, challenge)
		if (same(c->type, failed->type) &&
		    same_identifier(&c->id, &failed->id))
			name = c->name;
	return contains(seen, name) ? NONE : text(" (TXT record %)", name);
}

/* Add what failed in an authorization. */
static void
add_failures(struct list *all, const struct authorization *a)
{
	bool known = is_pending(a);
	Str seen;

	for (size_t i = 0; i < a->nchallenge; i++) {
		const struct challenge *c = &a->challenge[i];

		if (!is_failed(c))
			continue;
		seen = c->error.n ? problem_text(c->error) :
		    S("its challenge is invalid");
		list_add(all, "; ", cat(NONE, a->id.value, S(": "), seen,
		    txt_hint(c, seen)));
		known = true;
	}
	if (!known)
		list_add(all, "; ", text("%: its authorization is %",
		    a->id.value, brief(a->status)));
}

/*
 * What failed, name by name; NONE if nothing did. Challenges that failed
 * before another one made the authorization valid do not count.
 */
static Str
failures(void)
{
	struct list all = list_begin();
	const struct authorization *a;

	for each(a, authorization)
		if (!is(a->status, "valid"))
			add_failures(&all, a);
	return list_text(&all);
}

/*
 * Count the errors of challenges: all, those of the CA itself, and those of
 * DNS challenges.
 */
static void
count_errors(size_t *all, size_t *internal, size_t *dns)
{
	for (size_t i = 0; i < noffered; i++) {
		Str type = text_of(offered[i].error, "type");

		*all += type.n > 0;
		*internal += is(type, ERROR "serverInternal");
		*dns += type.n && publishes(&offered[i], TXT_RECORD);
	}
}

/* --------------------------------------------------------- 37. Waiting -- */

static const char *published_in;	/* DIR of -w, once files are there */

/* If the CA found no file, or other content: where the files were. */
static Str
files_hint(Str seen)
{
	Str dir = str(published_in);

	if (!contains(seen, S(ERROR "unauthorized")) &&
	    !contains(seen, S(ERROR "incorrectResponse")))
		return NONE;
	while (dir.n > 1 && dir.p[dir.n - 1] == '/')
		dir.n--;
	if (dir.n >= 14 && is(from(dir, dir.n - 14), "acme-challenge"))
		return text("; the files were in %", brief(dir));
	return text("; the files were in %, which must be the directory that "
	    "the web server shows as /.well-known/acme-challenge/",
	    brief(dir));
}

/*
 * End the step of an order that cannot become valid, with the failures of its
 * authorizations or, if there are none, with the error of the order. If all
 * errors are of the CA itself (RFC 8555 6.7, serverInternal), the user has
 * nothing to correct.
 */
static void
validation_failed(const char *what, Str error)
{
	Str seen = failures();
	size_t all = 0, internal = 0, dns = 0;

	count_errors(&all, &internal, &dns);
	if (all == 0 && error.n) {
		all = 1;
		internal = is(text_of(error, "type"), ERROR "serverInternal");
	}
	if (!seen.n)
		seen = error.n ? problem_text(error) :
		    S("the CA gave no reason");
	if (all && all == internal)
		remedy = S("; the CA itself failed: place a new order");
	else if (published_in)
		remedy = files_hint(seen);
	else if (dns)
		remedy = S("; acme-step challenges prints what to publish "
		    "for a new order");
	die(all && all == internal ? CA_DOWN : REFUSED, "% %", str(what),
	    seen);
}

#define NOT_VALIDATED "the CA could not validate"

/* End the step of an invalid order. */
static void
order_failed(void)
{
	struct response r = acme_post(need("order"), NONE);
	Str error = member(&r, json_body(&r), "error", '{');

	fetch_authorizations(false);
	validation_failed("the order is invalid:", error);
}

/* The challenge types that a pending name offers, with their errors. */
static Str
types_needed(const struct authorization *a)
{
	struct list types = list_begin();

	for (size_t i = 0; i < a->nchallenge; i++) {
		const struct challenge *c = &a->challenge[i];

		list_add(&types, " ", c->error.n ? text("% (%)",
		    brief(c->type), problem_text(c->error)) : brief(c->type));
	}
	return list_text(&types);
}

/*
 * End the step at its time limit: `what` it was doing, and what is `still` so.
 * If `after` is positive, the CA asks for that many seconds before the next
 * request.
 */
static void
limit_reached(const char *what, Str still, long after)
{
	if (after > 0)
		remedy = text("; try again after % s",
		    num((unsigned long)after));
	remedy = cat(NONE, remedy, limit_hint());
	die(LATER, "time limit of % s reached while %: %", num(activity.limit),
	    str(what), still);
}

/* The same for a pending order: report what each name still needs. */
static void
order_lacks(const char *what, long after)
{
	struct list all;
	const struct authorization *a;

	fetch_authorizations(false);
	all = list_begin();
	for each(a, authorization)
		if (is_pending(a))
			list_add(&all, "; ", text("% still needs one of %",
			    a->id.value, types_needed(a)));
	limit_reached(what, text("the order is still pending; %",
	    list_text(&all)), after);
}

/*
 * End the step if a challenge has failed; some CAs leave the order pending
 * then.
 */
static void
look_for_failures(void)
{
	size_t mark = used;

	fetch_pending();
	if (failures().n)
		validation_failed(NOT_VALIDATED, NONE);
	used = mark;
}

/*
 * The pauses between looks at an order, in ms: some CAs need 10 ms for what
 * takes others seconds. Less than the first one is not worth another look.
 */
enum { FIRST_PAUSE = 50, LAST_PAUSE = 5000 };

/*
 * Wait before the next look at an order or an authorization: as long as the
 * CA asks (`after` seconds, if positive); else, or if the step does not have
 * that time, *pause ms, which grow, since the last look was sent. The last
 * pause is cut to the time that is left. False if none is left.
 */
static bool
pause_between(const char *what, long after, long long *pause)
{
	long long own = *pause, most;

	*pause = own * 3 / 2 < LAST_PAUSE ? own * 3 / 2 : LAST_PAUSE;
	if (after > 0 && pause_for(what, after * 1000LL))
		return true;
	if (boxed)
		return pause_for(what, own);
	own -= now_ms() - conn.sent;
	most = time_to_wait() - FIRST_PAUSE;
	return most > 0 && (own <= 0 || pause_for(what, own < most ? own :
	    most));
}

/* Store an order if its status is not that of the record. */
static bool
is_news(const struct response *r)
{
	Str status = member(r, json_body(r), "status", '"');

	if (status_bit(status) == order.status)
		return false;
	order_store(r);
	return true;
}

/*
 * Is it time to look for failures, which a pending order may not show? After
 * three seconds, and when twice the time has passed. A box has no time: there
 * it is each fourth look.
 */
static bool
is_time_for_failures(long long start, long long *next, int looks)
{
	if (order.status != PENDING || time_to_wait() <= report_time)
		return false;
	if (boxed)
		return looks % 4 == 0;
	if (now_ms() - start < *next)
		return false;
	*next *= 2;
	return true;
}

/*
 * Fetch the order until its status is not in a set; `after` is what the CA
 * asked for at the last look, in seconds, if positive. Ends the step at the
 * time limit.
 */
static void
order_await(unsigned set, const char *what, long after)
{
	long long pause = FIRST_PAUSE, start = now_ms(), next = 3000;
	struct response r;

	for (int looks = 1; order.status & set; looks++) {
		size_t mark = used;

		if (!pause_between(what, after, &pause)) {
			if (order.status == PENDING)
				order_lacks(what, after);
			limit_reached(what, text("the order is still %",
			    status_text(&order.status)), after > 0 ? after : 5);
		}
		r = acme_post(need("order"), NONE);
		after = r.retry_after;
		if (is_news(&r))
			continue;
		if (is_time_for_failures(start, &next, looks))
			look_for_failures();
		used = mark;
	}
}

/*
 * Fetch authorizations that belong to no order (RFC 8555 7.4.1) until none is
 * pending. Ends the step at the time limit.
 */
static void
authorizations_await(const char *what)
{
	long long pause = FIRST_PAUSE;

	for (;;) {
		const struct authorization *a;
		size_t mark = used, waiting = 0;
		long after = -1;

		fetch_pending();
		if (failures().n)
			validation_failed(NOT_VALIDATED, NONE);
		for each(a, authorization) {
			waiting += is_pending(a);
			if (a->retry_after > after)
				after = a->retry_after;
		}
		if (waiting == 0)
			return;
		used = mark;
		if (!pause_between(what, after, &pause))
			limit_reached(what, S("an authorization is still "
			    "pending"), after);
	}
}

/* ------------------------------------------------------ 38. Challenges -- */

/* RFC 8555 8.1. */
static Str
key_authorization(Str token)
{
	return text("%.%", token, thumbprint(signer()));
}

/* A name without "*.". */
static Str
bare(Str name)
{
	return from(name, begins(name, "*.") ? 2 : 0);
}

/*
 * The names and contents of the challenge types. URL and token have been
 * checked.
 */
static Str
token_of(const struct challenge *c)
{
	return c->token;
}

static Str
key_authorization_of(const struct challenge *c)
{
	return key_authorization(c->token);
}

static Str
txt_name(const struct challenge *c)
{
	return text("_acme-challenge.%", bare(c->id.value));
}

/* The label is the account's (draft-ietf-acme-dns-account-label 3.1). */
static Str
account_txt_name(const struct challenge *c)
{
	Str h = sha256(order.account);

	return text("_%.%", base32((Str){ h.p, 10 }), txt_name(c));
}

static Str
txt_digest(const struct challenge *c)
{
	return b64(sha256(key_authorization(c->token)));
}

static Str
persist_name(const struct challenge *c)
{
	return text("_validation-persist.%", bare(c->id.value));
}

/*
 * An issue-value that stays (draft-ietf-acme-dns-persist 3.1). It gives an
 * account at a CA a permanent right: so the account must be one of that CA,
 * and neither part may contain a ";" (RFC 8659 4.2).
 */
static Str
persist_value(const struct challenge *c)
{
	Str list = list_of(c->object, "issuer-domain-names"), none, issuer;
	Str account = text_of(c->object, "accounturi");

	if (account.n && !same(account, order.account))
		broken(c, "has a challenge for another account: %",
		    brief(account));
	if (!json_each(&list, &none, &issuer) || json_kind(issuer) != '"' ||
	    !is_name(S("dns"), json_text(issuer)) ||
	    begins(json_text(issuer), "*."))
		broken(c, "has a dns-persist-01 challenge without a valid "
		    "issuer-domain-names");
	need_own(order.account);
	if (contains(order.account, S(";")))
		broken(c, "has a dns-persist-01 challenge, but the account's "
		    "URL cannot be part of a TXT record: %", order.account);
	return cat(NONE, json_text(issuer), S("; accounturi="), order.account,
	    begins(c->id.value, "*.") ? S("; policy=wildcard") : NONE);
}

/* The SNI name for an identifier; RFC 8738 6 defines one for addresses. */
static Str
sni_name(const struct challenge *c)
{
	Str ip = is_ip(c->id.type) ? ip_bytes(c->id.value) : NONE, s = NONE;

	if (!ip.n)
		return c->id.value;
	for (size_t i = ip.n; i-- > 0; )
		s = cat(NONE, s, ip.n == 4 ? text("%.", num(ip.p[i])) :
		    text("%.%.", hex_number(ip.p[i] & 15U),
		    hex_number(ip.p[i] >> 4)));
	return cat(NONE, s, ip.n == 4 ? S("in-addr.arpa") : S("ip6.arpa"));
}

static Str
alpn_digest(const struct challenge *c)
{
	return hex(sha256(key_authorization(c->token)));
}

/*
 * Add an offered challenge to the order, ready to be published; one of an
 * unknown type is skipped.
 */
static void
add_challenge(const struct authorization *a, const struct challenge *offer)
{
	const struct challenge_type *t = find_challenge_type(offer->type);
	struct challenge c = *offer;

	if (!t)
		return;
	if (!c.url.n)
		broken(a, "lacks the member %", S("url"));
	if (t->has_token && (!is_b64(c.token) || c.token.n > TOKEN))
		broken(a, "has an invalid token: %", brief(c.token));
	need_own(c.url);
	c.name = t->name(&c);
	c.content = t->content(&c);
	put("challenge", challenge_text(&c), a->url);
	order.challenge[order.nchallenge - 1].token = c.token;
}

static void
not_offered(const char *type, Str id, Str others)
{
	die(REFUSED, others.n ? "the CA offers no % challenge for %, only %" :
	    "the CA offers no % challenge for %, nor any other", str(type), id,
	    others);
}

/* The types of an authorization's challenges that have not failed. */
static Str
offered_types(const struct authorization *a)
{
	struct list all = list_begin();

	for (size_t i = 0; i < a->nchallenge; i++)
		if (!is(a->challenge[i].status, "invalid"))
			list_add(&all, " ", brief(a->challenge[i].type));
	return list_text(&all);
}

/*
 * Add the challenges of an authorization that can be answered: those of a
 * type, or all.
 */
static void
add_pending(const struct authorization *a, const char *type)
{
	if (!a->challenge)
		broken(a, "lacks the member %", S("challenges"));
	for (size_t i = 0; i < a->nchallenge; i++) {
		const struct challenge *c = &a->challenge[i];

		if (!c->type.n)
			broken(a, "lacks the member %", S("type"));
		if (!is(c->status, "invalid") && (!type || is(c->type, type)))
			add_challenge(a, c);
	}
}

/*
 * Add the challenges of the pending authorizations: those of a type, or all.
 * One that failed but is pending, as some CAs leave it, may be answered
 * again.
 */
static void
add_challenges(const char *type)
{
	bool failed = failures().n > 0;
	const struct authorization *a;

	for each(a, authorization) {
		size_t before = order.nchallenge;

		if (!is_usable(a))
			validation_failed(NOT_VALIDATED, NONE);
		if (!is_pending(a))
			continue;
		add_pending(a, type);
		if (failed && order.nchallenge == before)
			validation_failed(NOT_VALIDATED, NONE);
		if (type && order.nchallenge == before)
			not_offered(type, a->id.value, offered_types(a));
	}
}

/* The types of the record's challenges for an identifier. */
static Str
types_for(const struct identifier *id)
{
	struct list all = list_begin();
	const struct challenge *c;

	for each(c, challenge)
		if (same_identifier(&c->id, id))
			list_add(&all, " ", c->type);
	return list_text(&all);
}

/*
 * Keep one challenge for each name: the one of the type, or the only one if
 * no type is given.
 */
static void
choose_challenges(const char *type)
{
	static struct identifiers names;
	size_t all[NAMES] = { 0 }, fit[NAMES] = { 0 }, kept = 0, at;
	const struct challenge *c;

	for each(c, challenge) {
		at = add_identifier(&names, &c->id);
		all[at]++;
		fit[at] += type && is(c->type, type);
	}
	for (at = 0; at < names.n; at++) {
		const struct identifier *id = &names.id[at];

		if (!type && all[at] > 1)
			die(USAGE, "% has several challenges; choose one "
			    "with -t: %", id->value, types_for(id));
		if (type && fit[at] == 0)
			not_offered(type, id->value, types_for(id));
	}
	for each(c, challenge)
		if (!type || is(c->type, type))
			order.challenge[kept++] = *c;
	order.nchallenge = kept;
	if (kept > NAMES)
		die(FAULT, "more than % challenges", num(NAMES));
}

/*
 * Add one challenge that the CA has validated for each authorization, of a
 * type or any, except those whose record stays.
 */
static void
add_validated(const char *type)
{
	const struct authorization *a;

	for each(a, authorization)
		for (size_t i = 0; i < a->nchallenge; i++) {
			const struct challenge *c = &a->challenge[i];
			const struct challenge_type *t =
			    find_challenge_type(c->type);

			if (is(c->status, "valid") && t && !t->stays &&
			    (!type || is(c->type, type))) {
				add_challenge(a, c);
				break;
			}
		}
}

/*
 * The response to a request to validate. A CA that was asked before may
 * refuse; then the state of the challenge decides.
 */
static void
check_asked(const struct response *r, Str url)
{
	struct post look = { .url = url };
	struct response now;

	if (has_type(r, "conflict"))
		return;		/* it is already being validated */
	if (r->status < 400 || r->status >= 500 || r->status == 429) {
		accept_response(r);
		return;
	}
	acme_batch(&look, &now, 1);
	if (now.status != 200 ||
	    is(text_of(json_body(&now), "status"), "pending"))
		accept_response(r);
}

/*
 * Ask the CA to validate (RFC 8555 7.5.1). With `look` the order is fetched
 * by the same write, if there is a nonce for that: some CAs validate at once.
 * Returns the seconds that the CA asks for before the next look, or -1.
 */
static long
ask_to_validate(bool look)
{
	static struct post p[NAMES + 1];
	static struct response r[NAMES + 1];
	const struct challenge *c;
	size_t n = 0;

	for each(c, challenge)
		p[n++] = (struct post){ .url = c->url, .payload = S("{}"),
		    .made = true };
	look = look && !boxed && (nnonce > n || n >= NONCES);
	if (look)
		p[n] = (struct post){ .url = need("order") };
	acme_batch(p, r, n + look);
	for (size_t i = 0; i < n; i++)
		check_asked(&r[i], p[i].url);
	if (!look || r[n].status != 200)
		return -1;
	is_news(&r[n]);
	return r[n].retry_after;
}

/* ------------------------------------------------ 39. Publishing files -- */

enum { ENTROPY = 22 };	/* characters of a token: 128 bits, RFC 8555 11.3 */

/*
 * Did an earlier run that was killed leave this file? It holds the content or
 * less: a beginning, or nothing. Less proves little, and the CA chooses the
 * name: then the file must be our user's, and its name as long as a token's.
 */
static bool
is_leftover(int dir, const char *name, Str content)
{
	unsigned char b[WORD];
	struct stat st;
	ssize_t n = -1;
	int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK |
	    O_NOCTTY | O_CLOEXEC);

	if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) &&
	    st.st_size <= (off_t)content.n)
		n = read(fd, b, sizeof b);
	if (fd >= 0)
		close(fd);
	return n >= 0 && n == st.st_size &&
	    has_prefix(content, (Str){ b, (size_t)n }) &&
	    ((size_t)n == content.n ||
	    (st.st_uid == geteuid() && strlen(name) >= ENTROPY));
}

/* Give a file its final name, replacing a leftover; false, with errno. */
static bool
name_published(int dir, const char *temporary, const char *name, Str content)
{
	if (name_file(dir, temporary, name))
		return true;
	if (errno != EEXIST)
		return false;
	if (is_leftover(dir, name, content))
		return renameat(dir, temporary, dir, name) == 0;
	errno = EEXIST;
	return false;
}

/* Publish a file (respond -w); it is complete or absent. */
static void
publish_file(int dir, const char *dir_name, const struct challenge *c)
{
	const char *name = c_str(c->name), *temporary;
	int fd = create_temporary(dir, &temporary, 0644);
	sigset_t old;
	bool named, alone;

	if (fd < 0)
		die(NO_PLACE, "cannot create % in %: %", c->name,
		    str(dir_name), why());
	/* The web server, another user, needs this whatever our umask. */
	if (!set_mode(fd, 0644, 0444, 0))
		die(NO_PLACE, "cannot create % in %: its file system would "
		    "not let the web server read it", c->name, str(dir_name));
	if (!write_all(fd, c->content) || !synced(fd) || close(fd) != 0)
		die(IO, "cannot write % in %: %", c->name, str(dir_name),
		    why());
	block_signals(&old);
	named = name_published(dir, temporary, name, c->content);
	if (named)
		cleanup[ncleanup - 1].p = name;
	alone = named && drop_name(dir, temporary);
	sigprocmask(SIG_SETMASK, &old, NULL);
	if (!named)
		die(NO_PLACE, "cannot create % in %: %", c->name,
		    str(dir_name), why());
	if (!alone)
		die(IO, "cannot remove % in %: %", str(temporary),
		    str(dir_name), why());
}

/* http-01: publish a file in DIR for each token, for the web server. */
static void
publish_files(const char *dir_name)
{
	int dir = open_directory(dir_name);
	const struct challenge *c;

	if (dir < 0)
		die(NO_PLACE, "cannot open the directory %: %", str(dir_name),
		    why());
	published_in = dir_name;
	for each(c, challenge)
		publish_file(dir, dir_name, c);
}

/* Remove the file of a challenge if an earlier run that was killed left it. */
static void
remove_leftover(int dir, Str token, Str content)
{
	const char *name = c_str(token);

	if (is_leftover(dir, name, content) &&
	    unlinkat(dir, name, 0) != 0 && errno != ENOENT)
		warn("cannot remove %: %", token, why());
}

/* The same for all fetched authorizations that are no longer pending. */
static void
remove_leftovers(const char *dir_name)
{
	int dir = open_directory(dir_name);
	const struct authorization *a;

	for each(a, authorization) {
		if (dir < 0 || !a->status.n || is_pending(a))
			continue;
		for (size_t i = 0; i < a->nchallenge; i++) {
			const struct challenge *c = &a->challenge[i];

			if (publishes(c, FILE_TOKEN) && is_b64(c->token) &&
			    c->token.n <= TOKEN)
				remove_leftover(dir, c->token,
				    key_authorization(c->token));
		}
	}
	close(dir);
}

/*
 * Is there a file whose name and content are the token and key authorization
 * of a challenge of this account? closedir() is left out: it needs free().
 */
static bool
has_leftover(const char *dir_name)
{
	DIR *list = opendir(dir_name);
	struct dirent *e;
	struct stat st;
	bool found = false;

	while (list && !found && (e = readdir(list))) {
		size_t mark = used;
		Str name = str(e->d_name), content;

		if (!is_b64(name) || name.n > TOKEN)
			continue;
		content = key_authorization(name);
		found = fstatat(dirfd(list), e->d_name, &st,
		    AT_SYMLINK_NOFOLLOW) == 0 &&
		    st.st_size == (off_t)content.n &&
		    is_leftover(dirfd(list), e->d_name, content);
		used = mark;
	}
	return found;
}

/*
 * The order needs no more responses: remove the files that an earlier run
 * that was killed left in DIR. The tokens are those of the challenge lines or,
 * if there are none, the CA's, which is asked only if DIR has such a file.
 */
static void
clean_up_files(const char *dir_name)
{
	int dir = open_directory(dir_name);
	const struct challenge *c;

	for each(c, challenge)
		if (dir >= 0 && publishes(c, FILE_TOKEN))
			remove_leftover(dir, c->name, c->content);
	close(dir);
	if (order.nchallenge || !has_leftover(dir_name))
		return;
	if (!order.nauthorization)
		order_refresh();
	fetch_authorizations(true);
	remove_leftovers(dir_name);
}

/* -------------------------------------------------- 40. HTTP responder -- */

/*
 * With -l a process of our own answers the challenges. It has nothing of
 * value: no key except its own for tls-alpn-01, no connection to the CA, no
 * file and, if it can give them up, no rights of root. It ends with the step.
 * What it keeps of its peers is in the memory that is set aside here.
 */
enum {
	NOBODY    = 65534,	/* user and group that own nothing */
	FILES     = 65536,	/* descriptors to close; low ones come first */
	RETRY     = 100,	/* ms to pause if the system lacks resources */
	LISTENERS = 4,		/* TCP and UDP of IPv4, then of IPv6 */
	CLIENTS   = 256,	/* peers at once; one more ends the oldest */
	PATIENCE  = 10,		/* seconds for a peer */
	REQUEST   = 4096,	/* bytes of a peer's request, a TLS record */
	PLAIN     = 512,	/* of a UDP response (RFC 1035 4.2.1), ... */
	DATAGRAM  = 1232,	/* ... and with EDNS, DNS Flag Day 2020 */
	FACTOR    = 4		/* and at most this many times its query */
};

static struct client {
	int fd;
	long long since;	/* by now_ms() */
	bool answered;		/* what it sends now is ignored */
	bool begun;		/* a balancer's header, if any, was read */
	size_t n;		/* bytes in b */
	unsigned char b[REQUEST + 325];	/* 325: see BR_SSL_BUFSIZE_MONO */
	struct tls_server tls;
} clients[CLIENTS];

static struct pollfd listeners[LISTENERS];
static long long accept_after;		/* by now_ms() */

static void
client_close(struct client *c)
{
	close(c->fd);
	c->fd = -1;
}

/* Let the peer read the response: a reset could overtake it. */
static void
client_answered(struct client *c)
{
	shutdown(c->fd, SHUT_WR);
	c->answered = true;
}

/* Send s with one write; disconnect a peer that does not take all of it. */
static void
client_send(struct client *c, Str s)
{
	if (write(c->fd, s.p, s.n) != (ssize_t)s.n)
		client_close(c);
}

/* Receive more; false if the connection has ended or the buffer is full. */
static bool
client_read(struct client *c)
{
	ssize_t n;

	if (c->answered)
		c->n = 0;
	if (c->n == REQUEST)
		return false;
	n = read(c->fd, c->b + c->n, REQUEST - c->n);
	if (n > 0)
		c->n += (size_t)n;
	return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

/* The content of the challenge with a name; NONE for other names. */
static Str
content_of(Str name)
{
	const struct challenge *c;

	for each(c, challenge)
		if (same(c->name, name))
			return c->content;
	return NONE;
}

#define WELL_KNOWN "/.well-known/acme-challenge/"

/* Respond to one request (RFC 9112 3, RFC 8555 8.3), and then close. */
static void
http_serve(struct client *c)
{
	bool more = client_read(c);
	Str s = { c->b, c->n }, method, path, content = NONE;

	if (more && (c->answered || !(contains(s, S("\n\r\n")) ||
	    contains(s, S("\n\n")))))
		return;
	if (c->answered || c->n == 0) {
		client_close(c);
		return;
	}
	method = cut(&s, ' ');
	path = cut(&s, ' ');
	if ((is(method, "GET") || is(method, "HEAD")) &&
	    begins(path, WELL_KNOWN) && begins(s, "HTTP/1."))
		content = content_of(from(path, sizeof WELL_KNOWN - 1));
	client_send(c, text("HTTP/1.1 %\r\nContent-Type: "
	    "application/octet-stream\r\nContent-Length: %\r\n"
	    "Connection: close\r\n\r\n%", content.n ? S("200 OK") :
	    S("404 Not Found"), num(content.n),
	    is(method, "GET") ? content : NONE));
	if (c->fd >= 0)
		client_answered(c);
}

/* ---------------------------------------------- 41. TLS-ALPN responder -- */

/* A certificate for each challenge, in their order, all with the same key. */
static Str validation[NAMES];

/*
 * A self-signed certificate for the name, with the digest in a critical
 * extension (RFC 8737 3, RFC 8738 6).
 */
static Str
validation_certificate(const struct challenge *c)
{
	const struct key *k = &other_key;
	Str name = seq(der(SET, seq(COMMON_NAME, der(UTF8, S("acme-step")))));
	Str info = seq(
	    der(VERSION_0, TWO),
	    ONE,
	    S(ECDSA_SHA256),
	    name,
	    seq(der(UTC_TIME, S("700101000000Z")),
	        der(UTC_TIME, S("491231235959Z"))),
	    name,
	    public_key(k),
	    der(EXTS, seq(
	        seq(SUBJECT_ALT, der(OCTETS, seq(general_name(&c->id)))),
	        seq(ACME_IDENTIFIER, TRUE,
	            der(OCTETS, der(OCTETS, unhex(c->content)))))));

	return seq(info, S(ECDSA_SHA256), bits(sign(k, info, true)));
}

static void
make_validations(void)
{
	Str *v = validation;
	const struct challenge *c;

	key_make(&other_key, &key_types[0]);
	for each(c, challenge) {
		size_t mark = used;

		*v++ = keep(mark, validation_certificate(c));
	}
}

/* The certificate for the name of a handshake; NONE for other names. */
static Str
find_validation(Str sni)
{
	const struct challenge *c;

	for each(c, challenge)
		if (same_nocase(c->name, sni))
			return validation[c - order.challenge];
	return NONE;
}

static void
alpn_begin(struct client *c)
{
	tls_accept(&c->tls, c->b, sizeof c->b, &other_key,
	    find_validation);
}

static void
alpn_serve(struct client *c)
{
	if (!tls_serve(&c->tls, c->fd))
		client_close(c);
}

/* --------------------------------------------------- 42. DNS responder -- */

/* DNS numbers (RFC 1035 3.2.2, 4.1.1; RFC 6891 6.1). */
enum {
	SOA = 6, TXT = 16, OPT = 41, IN = 1,
	IS_REPLY = 0x8000, OPCODE = 0x7800, AUTHORITATIVE = 0x0400,
	TRUNCATED = 0x0200, RECURSION_DESIRED = 0x0100,
	FORMAT_ERROR = 1, NOT_IMPLEMENTED = 4, NOT_OURS = 5,
	DNS_HEAD = 12		/* bytes of a header; then comes the question */
};

static Str
u16(size_t n)
{
	unsigned char *p = alloc(2);

	p[0] = (unsigned char)(n >> 8);
	p[1] = (unsigned char)n;
	return (Str){ p, 2 };
}

static unsigned
u16_at(Str s, size_t at)
{
	return s.p[at] * 256U + s.p[at + 1];
}

/* A question (RFC 1035 4.1.2). */
struct question {
	Str wire;		/* as it came, to be sent back */
	Str name;		/* in lower case, with dots */
	unsigned type, class;
};

/* Read the question of a message; false if it is malformed. */
static bool
dns_question(Str m, struct question *q)
{
	Str s = from(m, DNS_HEAD), label;

	q->name = NONE;
	while (s.n && s.p[0]) {
		label = (Str){ s.p + 1, s.p[0] };
		if (label.n > 63 || label.n + 1 >= s.n ||
		    memchr(label.p, '.', label.n) || q->name.n > HOSTNAME)
			return false;
		q->name = cat(NONE, q->name, q->name.n ? S(".") : NONE,
		    lower(label));
		s = from(s, 1 + label.n);
	}
	if (s.n < 5)
		return false;
	q->type = u16_at(s, 1);
	q->class = u16_at(s, 3);
	q->wire = (Str){ m.p + DNS_HEAD, (size_t)(s.p + 5 - m.p) - DNS_HEAD };
	return true;
}

/*
 * A record with a TTL of 0. Its owner is the name at an offset in the
 * question, as a pointer to it (RFC 1035 4.1.3, 4.1.4).
 */
static Str
dns_record(size_t at, unsigned type, Str data)
{
	return cat(u16(0xc000 | (DNS_HEAD + at)), u16(type), u16(IN),
	    S("\0\0\0\0"), u16(data.n), data);
}

/* A text as strings of up to 255 bytes (RFC 1035 3.3.14). */
static Str
dns_text(Str s)
{
	Str all = NONE;

	do {
		size_t n = s.n < 255 ? s.n : 255;
		unsigned char length = (unsigned char)n;

		all = cat(NONE, all, (Str){ &length, 1 }, (Str){ s.p, n });
		s = from(s, n);
	} while (s.n);
	return all;
}

/* The SOA of a zone that exists for minutes and is never transferred. */
static Str
dns_soa(size_t at)
{
	Str zone = u16(0xc000 | (DNS_HEAD + at));

	return dns_record(at, SOA, cat(NONE, zone, zone,
	    S("\0\0\0\1" "\0\0\16\20" "\0\0\2\130" "\0\1\121\200" "\0\0\0\0")));
}

/*
 * Find all answers to a question, *n of them; false if its name is neither a
 * challenge's nor below one, which begins at offset *zone in it.
 */
static bool
dns_answers(const struct question *q, Str *answers, size_t *zone, size_t *n)
{
	const struct challenge *c;
	size_t mark = used;
	bool ours = false;

	*answers = NONE;
	*n = 0;
	for each(c, challenge) {
		size_t above = q->name.n - c->name.n;

		if (c->name.n > q->name.n ||
		    !same_nocase(from(q->name, above), c->name) ||
		    /* NOLINTNEXTLINE(clang-analyzer-*): if NONE, above is 0 */
		    (above && q->name.p[above - 1] != '.'))
			continue;
		ours = true;
		*zone = above;
		if (above || q->type != TXT)
			continue;
		*answers = keep(mark, cat(NONE, *answers, dns_record(0, TXT,
		    dns_text(c->content))));
		++*n;
	}
	return ours;
}

/*
 * Does the query use EDNS? Then raise *limit to the size that it allows, at
 * most DATAGRAM.
 */
static bool
dns_extended(Str m, const struct question *q, size_t *limit)
{
	Str s = from(m, DNS_HEAD + q->wire.n);

	if (u16_at(m, 6) || u16_at(m, 8) || !u16_at(m, 10) || s.n < 11 ||
	    s.p[0] || u16_at(s, 1) != OPT)
		return false;
	if (*limit < DATAGRAM && u16_at(s, 3) > *limit)
		*limit = u16_at(s, 3) < DATAGRAM ? u16_at(s, 3) : DATAGRAM;
	return true;
}

/*
 * The response to a message; NONE if that is not a query. Over UDP, where the
 * source address may be forged, it is at most FACTOR times as long as the
 * query: for more there is TCP.
 */
static Str
dns_answer(Str m, size_t limit)
{
	struct question q = { .wire = NONE };
	Str answers = NONE, soa = NONE, opt_record = NONE;
	unsigned flags, error = 0;
	size_t zone = 0, n = 0;

	if (m.n < DNS_HEAD || (flags = u16_at(m, 2)) & IS_REPLY)
		return NONE;
	flags = IS_REPLY | (flags & (OPCODE | RECURSION_DESIRED));
	if (flags & OPCODE)
		error = NOT_IMPLEMENTED;
	else if (u16_at(m, 4) != 1 || !dns_question(m, &q))
		error = FORMAT_ERROR;
	else if (q.class != IN || !dns_answers(&q, &answers, &zone, &n))
		error = NOT_OURS;
	if (q.wire.n && dns_extended(m, &q, &limit))
		opt_record = cat(S("\0"), u16(OPT), u16(DATAGRAM),
		    S("\0\0\0\0" "\0\0"));
	if (!error)
		flags |= AUTHORITATIVE;
	if (!error && n == 0)
		soa = dns_soa(zone);
	if (limit <= DATAGRAM && limit > FACTOR * m.n)
		limit = FACTOR * m.n;
	if (DNS_HEAD + q.wire.n + answers.n + opt_record.n > limit) {
		flags |= TRUNCATED;
		answers = NONE;
		n = 0;
	}
	return cat(NONE, (Str){ m.p, 2 }, u16(flags | error),
	    u16(q.wire.n > 0), u16(soa.n && q.type == SOA ? 1 : n),
	    u16(soa.n && q.type != SOA), u16(opt_record.n > 0), q.wire,
	    answers, soa, opt_record);
}

/*
 * Serve UDP (RFC 1035 4.2.1). The response must come from the address to
 * which the query was sent: the control message that names it is sent back.
 */
static void
dns_datagram(int fd)
{
	union { struct cmsghdr head; unsigned char b[64]; } asked;
	unsigned char b[REQUEST];
	struct sockaddr_storage peer;
	struct iovec data = { b, sizeof b };
	struct msghdr m = { .msg_name = &peer, .msg_namelen = sizeof peer,
	    .msg_iov = &data, .msg_iovlen = 1, .msg_control = &asked,
	    .msg_controllen = sizeof asked };
	ssize_t n = recvmsg(fd, &m, 0);
	Str s = n > 0 ? dns_answer((Str){ b, (size_t)n }, PLAIN) : NONE;

	data = (struct iovec){ (void *)s.p, s.n };
	if (s.n)
		sendmsg(fd, &m, 0);
}

/* Serve TCP: each message follows its length (RFC 1035 4.2.2). */
static void
dns_serve(struct client *c)
{
	bool more = client_read(c);
	size_t n;

	while (c->fd >= 0 && c->n >= 2) {
		Str s = { c->b, c->n };
		size_t mark = used;

		n = u16_at(s, 0);
		if (c->n < 2 + n)
			break;
		s = dns_answer((Str){ c->b + 2, n }, 65535);
		if (s.n)
			client_send(c, cat(NONE, u16(s.n), s));
		used = mark;
		c->n -= 2 + n;
		memmove(c->b, c->b + 2 + n, c->n);
	}
	if (!more && c->fd >= 0)
		client_close(c);
}

/* ----------------------------------------------------------- 43. Looks -- */

/*
 * With respond -c a process for each challenge (section 50) checks, as a CA
 * would, that its content is found at all places where a CA can look. It
 * visits them one after another, and reports each in a line. A hostile
 * server can make the look fail, and be quoted in the report; nothing more.
 */
enum {
	PLACES    = 64,		/* that one look visits */
	REACH     = 3,		/* seconds to connect to an address */
	REDIRECTS = 10,		/* that Boulder follows */
	ALIASES   = 8		/* and delegations, that are followed */
};

/* Report what was seen at this place; fail_by() reports failures. */
static void
report(const char *kind, Str what)
{
	begin_report(kind);
	line_add(what);
	line_end();
}

static void
report_success(void)
{
	report("+", S("as published"));
}

/* Look at one place; false if that failed, which has been reported. */
static bool
visit(Str place, void (*look)(void *), void *arg)
{
	static size_t places;
	volatile bool done = false;
	sigjmp_buf here;

	looking_at = place;
	if (++places > PLACES || time_left() <= 0) {
		report("-", S("too many places, or out of time"));
		return false;
	}
	retreat = &here;
	if (sigsetjmp(here, 0) == 0) {
		look(arg);
		done = true;
	}
	retreat = NULL;
	hang_up();
	preamble = remedy = NONE;
	return done;
}

/* Wait, until `end` at the latest, for a descriptor that can be used. */
static bool
ready(int fd, short events, long long end)
{
	struct pollfd p = { fd, events, 0 };
	long long ms = (end < deadline ? end : deadline) - now_ms();

	return wait_for(&p, ms > 0 ? (int)ms : 0) > 0;
}

/*
 * connect() failed immediately. If this machine lacks the address's family,
 * the address is left out, which is not a failure.
 */
static void
not_connected(Str port)
{
	if (lacks_family(errno)) {
		report("~", cat(S("cannot be reached from here: "), why()));
		siglongjmp(*retreat, 1);
	}
	die(CA_DOWN, "cannot connect to port %: %", port, why());
}

/* Connect to an address by TCP. */
static void
reach(struct address *a, Str port)
{
	int error = ETIMEDOUT;
	socklen_t n = sizeof error;
	unsigned long to;

	hang_up();
	number(port, MAX_PORT, &to);
	conn.fd = start_connecting(a, htons((in_port_t)to));
	if (conn.fd < 0)
		not_connected(port);
	if (ready(conn.fd, POLLOUT, now_ms() + REACH * 1000))
		getsockopt(conn.fd, SOL_SOCKET, SO_ERROR, &error, &n);
	if (error)
		die(CA_DOWN, "cannot connect to port %: %", port,
		    str(strerror(error)));
	fcntl(conn.fd, F_SETFL, fcntl(conn.fd, F_GETFL) & ~O_NONBLOCK);
}

static Str
address_text(const struct address *a)
{
	return ip_text(a->to.any.sa_family == AF_INET ?
	    (Str){ (const unsigned char *)&a->to.v4.sin_addr, 4 } :
	    (Str){ (const unsigned char *)&a->to.v6.sin6_addr, 16 });
}

/* A host and all its addresses. */
struct host {
	Str name, port;
	struct address at[2 * ADDRESSES];
	size_t n;
};

/* Find them without a new process: those of -H or, without any, all. */
static void
look_up_host(void *arg)
{
	struct host *h = arg;
	Str ip = ip_bytes(h->name);
	struct addrinfo hint = { .ai_socktype = SOCK_STREAM }, *list = NULL;
	struct address *a, found;
	size_t given, n = 0;
	int error = 0;

	begin_way();
	given = add_resolved_addresses(h->name, h->port);
	if (!given && ip.n)
		add_ip(ip);
	else if (!given)
		error = getaddrinfo(c_str(in_hosts(h->name) ? h->name :
		    text("%.", h->name)), NULL, &hint, &list);
	if (error)
		die(CA_DOWN, "%", str(gai_strerror(error)));
	for (; list; list = list->ai_next, n++) {
		found.n = list->ai_addrlen;
		memcpy(&found.to, list->ai_addr, list->ai_addrlen);
		add_address(&found);
	}
	for (h->n = 0; h->n < COUNT(h->at) && (a = next_address()); h->n++)
		h->at[h->n] = *a;
	if (h->n < n)
		die(LATER, "has more than % of a family", num(ADDRESSES));
}

static bool
find_host(struct host *h)
{
	return visit(text("address of %", h->name), look_up_host, h);
}

/* ------------------------------------------------------- 44. HTTP look -- */

/* A look at a URL, at one address of its host. */
struct page {
	const struct challenge *challenge;
	Str url, next;		/* where it redirects to, or NONE */
	struct url part;
	bool secure;		/* it is https */
	struct address at;
};

/* The page of a URL; false if it is malformed, or not http or https. */
static bool
page_of(Str url, struct page *p)
{
	p->url = url;
	p->secure = url_read(url, &p->part);
	return p->secure || url_of(url, S("http://"), S("80"), &p->part);
}

/* Resolve a redirect (RFC 3986 5.2); "?query" and dot segments are not. */
static Str
reference(const struct page *p, Str ref)
{
	Str path = p->part.path, base = cut(&path, '?'), rest = ref;

	ref = cut(&ref, '#');
	if (begins(ref, "//"))
		return text("%:%", p->secure ? S("https") : S("http"), ref);
	if (begins(ref, "/"))
		return cat(NONE, p->part.origin, ref);
	if (made_of(cut(&rest, ':'), ALPHA) && rest.n)
		return ref;
	while (base.n && base.p[base.n - 1] != '/')
		base.n--;
	return cat(NONE, p->part.origin, base.n ? base : S("/"), ref);
}

/* CAs follow redirects only to the ports of http and https. */
static void
redirect(struct page *p, Str to)
{
	struct page next;
	Str url = reference(p, to);

	if (!page_of(url, &next))
		die(LATER, "redirects to an invalid URL: %", brief(to));
	if (!is(next.part.port, "80") && !is(next.part.port, "443"))
		die(LATER, "redirects to port %, where CAs do not look",
		    next.part.port);
	p->next = url;
}

/* Is this the content? White space may follow it (RFC 8555 8.3). */
static bool
is_content(Str body, Str content)
{
	while (body.n && made_of(from(body, body.n - 1), " \t\r\n"))
		body.n--;
	return same(body, content);
}

/* Request the page: it must be the content or a redirect. */
static void
look_at_page(void *arg)
{
	struct page *p = arg;
	struct request q = { .method = "GET", .url = p->url };
	struct response r;
	Str ask = http_text(&q, &p->part, url_target(&p->part));

	reach(&p->at, p->part.port);
	conn.plain = !p->secure;
	conn.at = conn.have = 0;
	memcpy(conn.host, c_str(p->part.host), p->part.host.n + 1);
	if (p->secure && !tls_open_any(conn.fd, conn.host, NULL))
		conn_failed();
	if (!(p->secure ? tls_write(ask) : write_all(conn.fd, ask)) ||
	    !http_receive(&q, &r))
		die(CA_DOWN, "no response");
	if (r.status / 100 == 3 && r.location.n)
		redirect(p, r.location);
	else if (r.status != 200)
		die(LATER, "status %", num((unsigned)r.status));
	else if (!is_content(r.body, p->challenge->content))
		die(LATER, "other content: %", brief(r.body));
}

/* Look at a URL, at all addresses of its host. */
static void
look_at_url(const struct challenge *c, Str url, int redirects)
{
	struct page p = { .challenge = c };
	struct host h;
	Str place;

	if (!page_of(url, &p))
		return;
	h.name = p.part.host;
	h.port = p.part.port;
	if (!find_host(&h))
		return;
	for (size_t i = 0; i < h.n; i++) {
		size_t mark = used;

		p.at = h.at[i];
		p.next = NONE;
		place = address_text(&p.at);
		if (redirects)
			place = text("% (%)", place, brief(url));
		if (visit(place, look_at_page, &p) && !p.next.n)
			report_success();
		else if (p.next.n && redirects == REDIRECTS)
			report("-", S("too many redirects"));
		else if (p.next.n)
			look_at_url(c, keep(mark, p.next), redirects + 1);
		used = mark;
	}
}

/* http-01 (RFC 8555 8.3) */
static void
look_at_http(const struct challenge *c)
{
	look_at_url(c, text(ip_bytes(c->id.value).n == 16 ?
	    "http://[%]" WELL_KNOWN "%" : "http://%" WELL_KNOWN "%",
	    c->id.value, c->name), 0);
}

/* --------------------------------------------------- 45. TLS-ALPN look -- */

struct alpn_place {
	const struct challenge *challenge;
	struct address at;
};

/* Does a server send the challenge's certificate (RFC 8737 3)? */
static void
look_at_alpn(void *arg)
{
	struct alpn_place *p = arg;
	const struct challenge *c = p->challenge;
	const struct cert *sent = &chain.cert[0];
	struct extension e;
	struct identifier name;
	Str list, digest = NONE;

	reach(&p->at, S("443"));
	memcpy(conn.host, c_str(c->name), c->name.n + 1);
	if (!tls_open_any(conn.fd, conn.host, ACME_TLS))
		conn_failed();
	if (!tls_has_protocol())
		die(LATER, "does not know the protocol " ACME_TLS);
	list = sent->alt_names;
	if (!cert_name(&list, &name) || list.n ||
	    !same_identifier(&name, &c->id))
		die(LATER, "its certificate is not for this name alone");
	if (find_extension(sent, from(ACME_IDENTIFIER, 2), &e) && e.critical)
		der_next(&e.value, OCTETS, &digest);
	if (!same(hex(digest), lower(c->content)))
		die(LATER, "its certificate has another acmeIdentifier, or "
		    "none");
}

/* tls-alpn-01 */
static void
look_at_tls(const struct challenge *c)
{
	struct host h = { .name = c->id.value, .port = S("443") };
	struct alpn_place p = { .challenge = c };

	if (!find_host(&h))
		return;
	for (size_t i = 0; i < h.n; i++) {
		p.at = h.at[i];
		if (visit(address_text(&p.at), look_at_alpn, &p))
			report_success();
	}
}

/* --------------------------------------------------- 46. DNS questions -- */

enum {
	A = 1, NS = 2, CNAME = 5, AAAA = 28,
	NO_NAME = 3,		/* NXDOMAIN */
	ASKED = 3,		/* times by UDP, each time for ... */
	ANSWER = 1000		/* ... so many ms */
};

/* Read the name at an offset of a message, in lower case, and move on. */
static bool
dns_name(Str m, size_t *at, Str *name)
{
	char b[HOSTNAME + 2];
	int n = *at < m.n ? dn_expand(m.p, m.p + m.n, m.p + *at, b,
	    sizeof b) : -1;

	if (n < 0)
		return false;
	*at += (size_t)n;
	*name = lower(str(b));
	return true;
}

/* The records of a message, as they are read one after another. */
struct reader {
	Str m;
	size_t at;
	unsigned left[3];	/* unread records, by section */
};

enum { ANSWERS, AUTHORITY, ADDITIONAL };	/* these (RFC 1035 4.1) */

struct record {
	int section;
	Str owner, data;
	size_t at;		/* of the data in the message */
	unsigned type;
};

/* Begin to read the records of an answer, after its question. */
static struct reader
dns_records(Str m)
{
	struct reader w = { .m = m, .at = DNS_HEAD };
	Str name;

	for (size_t i = 0; i < COUNT(w.left); i++)
		w.left[i] = u16_at(m, 6 + 2 * i);
	dns_name(m, &w.at, &name);
	w.at += 4;
	return w;
}

/* Read the next record; false at the end, or at one that is malformed. */
static bool
dns_next(struct reader *w, struct record *r)
{
	int i = 0;
	size_t n;

	while (i < (int)COUNT(w->left) && !w->left[i])
		i++;
	if (i == COUNT(w->left) || !dns_name(w->m, &w->at, &r->owner) ||
	    w->m.n - w->at < 10)
		return false;
	w->left[i]--;
	r->section = i;
	r->type = u16_at(w->m, w->at);
	n = u16_at(w->m, w->at + 8);
	r->at = w->at + 10;
	if (n > w->m.n - r->at)
		return false;
	r->data = (Str){ w->m.p + r->at, n };
	w->at = r->at + n;
	return true;
}

struct query {
	Str wire;
	size_t end;		/* of its question */
};

/* A question; extended (EDNS), it asks for signatures, in DATAGRAM bytes. */
static struct query
dns_query(Str name, unsigned type, bool extended)
{
	enum { SIZE = DNS_HEAD + HOSTNAME + 2 + 4 };
	unsigned char *b = alloc(SIZE);
	int n = res_mkquery(0, c_str(name), IN, (int)type, NULL, 0, NULL, b,
	    SIZE);
	struct query q;

	if (n < 0)
		die(LATER, "is not a name for DNS");
	random_bytes(b, 2);
	b[2] = b[3] = 0;	/* no recursion */
	b[11] = extended;
	q.wire = (Str){ b, (size_t)n };
	q.end = q.wire.n;
	if (extended)
		q.wire = cat(NONE, q.wire, S("\0"), u16(OPT), u16(DATAGRAM),
		    S("\0\0\200\0" "\0\0"));
	return q;
}

/* Does a message answer a question? */
static bool
is_answer(Str m, const struct query *q)
{
	return m.n >= q->end && u16_at(m, 0) == u16_at(q->wire, 0) &&
	    u16_at(m, 2) & IS_REPLY && u16_at(m, 4) == 1 &&
	    same_nocase((Str){ m.p + DNS_HEAD, q->end - DNS_HEAD },
	    (Str){ q->wire.p + DNS_HEAD, q->end - DNS_HEAD });
}

/* Ask a server by UDP. */
static Str
ask_udp(struct address *a, const struct query *q)
{
	unsigned char *b = alloc(REQUEST);
	ssize_t n;

	hang_up();
	set_port(a, htons(53));
	conn.fd = socket(a->to.any.sa_family, SOCK_DGRAM, 0);
	if (conn.fd < 0 || connect(conn.fd, &a->to.any, a->n) != 0)
		not_connected(S("53"));
	for (int i = 0; i < ASKED; i++) {
		long long end = now_ms() + ANSWER;

		n = send(conn.fd, q->wire.p, q->wire.n, 0);
		while (n >= 0 && ready(conn.fd, POLLIN, end)) {
			n = recv(conn.fd, b, REQUEST, 0);
			if (n > 0 && is_answer((Str){ b, (size_t)n }, q))
				return (Str){ b, (size_t)n };
		}
		if (n < 0)
			die(CA_DOWN, "cannot connect to port 53: %", why());
	}
	die(CA_DOWN, "does not answer");
}

/* The next n bytes of a connection. */
static Str
receive(size_t n)
{
	unsigned char *p = alloc(n);
	size_t got = 0;

	while (got < n) {
		ssize_t more = ready(conn.fd, POLLIN, NEVER) ?
		    read(conn.fd, p + got, n - got) : 0;

		if (more <= 0)
			die(CA_DOWN, "its answer over TCP is incomplete");
		got += (size_t)more;
	}
	return (Str){ p, n };
}

/* Ask a server by TCP (RFC 1035 4.2.2). */
static Str
ask_tcp(struct address *a, const struct query *q)
{
	Str m;

	reach(a, S("53"));
	if (!write_all(conn.fd, cat(NONE, u16(q->wire.n), q->wire)))
		die(CA_DOWN, "closed the connection");
	m = receive(u16_at(receive(2), 0));
	if (!is_answer(m, q))
		die(CA_DOWN, "its answer over TCP is for another question");
	return m;
}

static unsigned
code_of(Str m)
{
	return u16_at(m, 2) & 15;
}

static Str
dns_ask(struct address *a, Str name, unsigned type)
{
	struct query q = dns_query(name, type, true);
	Str m = ask_udp(a, &q);

	if (code_of(m) == FORMAT_ERROR || code_of(m) == NOT_IMPLEMENTED) {
		/* It has no EDNS. */
		q = dns_query(name, type, false);
		m = ask_udp(a, &q);
	}
	return u16_at(m, 2) & TRUNCATED ? ask_tcp(a, &q) : m;
}

/*
 * The resolver's whole answer about a name; NONE if it has none. res_query()
 * returns no length if the name, or the type, does not exist.
 */
static Str
dns_resolve(Str name, unsigned type)
{
	unsigned char *b = alloc(REQUEST);
	Str m = { b, REQUEST };

	memset(b, 0, REQUEST);
	res_query(c_str(name), IN, (int)type, b, REQUEST);
	return (u16_at(m, 2) & (IS_REPLY | TRUNCATED)) == IS_REPLY &&
	    (code_of(m) == 0 || code_of(m) == NO_NAME) ? m : NONE;
}

/* -------------------------------------------------------- 47. DNS look -- */

/* A search for a TXT record: the zone's servers, and their answers. */
static struct {
	Str first, content;	/* the name and content of the challenge */
	Str name;		/* first, or what that is an alias of */
	Str zone;		/* whose servers are asked */
	struct server {
		Str name;
		struct address at;
	} server[PLACES];
	size_t n;
	Str alias;		/* what the name is an alias of, or NONE */
	struct {
		Str zone;	/* one that they delegate, ... */
		Str message;	/* ... and the message that does */
	} referral[PLACES];
	size_t nreferral;
} search;

static bool
has_server(Str name)
{
	for (size_t i = 0; i < search.n; i++)
		if (same(search.server[i].name, name))
			return true;
	return false;
}

/* Add the address of a server, if a record has one. */
static void
add_server(Str name, const struct record *r)
{
	if (search.n < PLACES && ((r->type == A && r->data.n == 4) ||
	    (r->type == AAAA && r->data.n == 16)))
		search.server[search.n++] = (struct server){ name,
		    address_of(r->data) };
}

/*
 * Find the addresses of a server. It is a failure, too, if the resolver cannot
 * answer for one family: a CA may ask the server at those addresses.
 */
static void
find_server(Str name)
{
	static const unsigned types[] = { A, AAAA };
	bool failed = false;
	struct record r;

	for (size_t i = 0; i < COUNT(types); i++) {
		size_t mark = used;
		Str m = dns_resolve(name, types[i]);
		struct reader w = { .m = NONE };

		if (m.n)
			w = dns_records(m);
		else
			failed = true;
		while (dns_next(&w, &r))
			if (r.section == ANSWERS)
				add_server(name, &r);
		used = mark;
	}
	if (failed || !has_server(name))
		report("-", text("cannot find the address of its name "
		    "server %", name));
}

/*
 * Add the servers of a zone that are in a section of a message; the limit is
 * reported when they are visited. False if it has none, or is malformed.
 */
static bool
use_servers(Str m, int section, Str zone)
{
	struct reader w = dns_records(m), glue;
	struct record r, g;
	size_t n = 0;
	Str name;

	while (search.n < PLACES && dns_next(&w, &r)) {
		if (r.section != section || r.type != NS ||
		    !same(r.owner, zone))
			continue;
		if (!dns_name(m, &r.at, &name))
			return false;
		n++;
		if (has_server(name))
			continue;
		for (glue = w; section != ANSWERS && dns_next(&glue, &g); )
			if (same(g.owner, name))
				add_server(name, &g);
		if (!has_server(name))
			find_server(name);
	}
	return n > 0 || search.n == PLACES;
}

/*
 * Ask the resolver for the closest zone above the name, and its servers. If
 * the name is itself a zone, those servers refer to its own ones: so the
 * resolver, which may be unable to reach the latter, is not asked for them.
 */
static void
find_zone(void *arg)
{
	Str m;

	(void)arg;
	search.n = 0;
	search.zone = search.name;
	while (cut(&search.zone, '.').n && search.zone.n) {
		m = dns_resolve(search.zone, NS);
		if (m.n && use_servers(m, ANSWERS, search.zone))
			return;
	}
	die(CA_DOWN, "cannot find its name servers");
}

/* Continue with all servers to which the zone's servers refer. */
static void
follow_referrals(void *arg)
{
	(void)arg;
	search.n = 0;
	for (size_t i = 0; i < search.nreferral; i++) {
		search.zone = search.referral[i].zone;
		if (!use_servers(search.referral[i].message, AUTHORITY,
		    search.zone))
			die(LATER, "is delegated to no name server");
	}
}

/* Do the strings of a TXT record (RFC 1035 3.3.14) make up a content? */
static bool
is_txt(Str data, Str content)
{
	while (data.n) {
		size_t n = data.p[0];

		if (n >= data.n || !has_prefix(content, (Str){ data.p + 1, n }))
			return false;
		data = from(data, 1 + n);
		content = from(content, n);
	}
	return content.n == 0;
}

/* Is a name the same as a domain, or below it? */
static bool
is_within(Str name, Str domain)
{
	size_t above = name.n - domain.n;

	return domain.n <= name.n && same(from(name, above), domain) &&
	    (above == 0 || name.p[above - 1] == '.');
}

/* Remember what the name is an alias of; all servers must agree. */
static void
note_alias(Str alias)
{
	if (search.alias.n && !same(search.alias, alias))
		die(LATER, "has it as an alias of %", alias);
	search.alias = alias;
}

/*
 * Ask one server for the record. The server must have it, or refer to another
 * name or zone; anything else is a failure.
 */
static void
look_at_server(void *arg)
{
	const struct server *server = arg;
	struct address at = server->at;
	Str m = dns_ask(&at, search.name, TXT), alias = NONE, child = NONE;
	struct reader w;
	struct record r;
	size_t others = 0;

	for (w = dns_records(m); dns_next(&w, &r); ) {
		bool ours = r.section == ANSWERS && same(r.owner, search.name);

		if (ours && r.type == CNAME)
			dns_name(m, &r.at, &alias);
		if (ours && r.type == TXT && is_txt(r.data, search.content)) {
			report_success();
			return;
		}
		others += ours && r.type == TXT;
		if (r.section == AUTHORITY && r.type == NS &&
		    r.owner.n > search.zone.n &&
		    is_within(search.name, r.owner))
			child = r.owner;
	}
	if (alias.n)
		note_alias(alias);
	else if (code_of(m) != 0 && code_of(m) != NO_NAME)
		die(LATER, "answers with RCODE %", num(code_of(m)));
	else if (u16_at(m, 2) & AUTHORITATIVE)
		die(LATER, "has % TXT records, none with the content",
		    num(others));
	else if (child.n) {
		search.referral[search.nreferral].zone = child;
		search.referral[search.nreferral++].message = m;
	} else
		die(LATER, "is not a name server of this zone");
}

static void
look_at_servers(void)
{
	for (size_t i = 0; i < search.n; i++) {
		struct server *s = &search.server[i];
		size_t mark = used;
		Str place;

		place = text("% (%)", s->name, address_text(&s->at));
		if (!same(search.name, search.first))
			place = text("% at %", search.name, place);
		visit(place, look_at_server, s);
		if (!search.alias.n && !search.nreferral)
			used = mark;
	}
}

/*
 * The DNS types: look at all servers of the zone, following aliases and
 * delegations.
 */
static void
look_at_dns(const struct challenge *c)
{
	search.name = lower(c->name);
	if (search.name.p[search.name.n - 1] == '.')
		search.name.n--;
	search.first = search.name;
	search.content = c->content;
	if (!visit(search.name, find_zone, NULL))
		return;
	for (int i = 0; i <= ALIASES; i++) {
		search.alias = NONE;
		search.nreferral = 0;
		look_at_servers();
		if (search.alias.n && search.nreferral)
			report("-", S("another server has an alias"));
		if (search.alias.n) {
			search.name = search.alias;
			if (!visit(search.name, find_zone, NULL))
				return;
		} else if (!search.nreferral ||
		    !visit(search.name, follow_referrals, NULL))
			return;
	}
	looking_at = search.name;
	report("-", S("too many aliases and delegations"));
}

/* ----------------------------------------------------------- 48. Peers -- */

/* How peers that validate challenges are served. */
struct responder {
	void (*begin)(struct client *);		/* NULL: nothing to do */
	void (*serve)(struct client *);
	void (*datagram)(int);			/* NULL: TCP alone */
};

static const struct responder http_responder = { NULL, http_serve, NULL };
static const struct responder alpn_responder =
    { alpn_begin, alpn_serve, NULL };
static const struct responder dns_responder =
    { NULL, dns_serve, dns_datagram };

static const struct challenge_type challenge_types[] = {
	{ "http-01", token_of, key_authorization_of, FILE_TOKEN, true,
	    false, &http_responder, look_at_http },	/* RFC 8555 8.3 */
	{ "dns-01", txt_name, txt_digest, TXT_RECORD, true,
	    false, &dns_responder, look_at_dns },	/* RFC 8555 8.4 */
	{ "tls-alpn-01", sni_name, alpn_digest, CERT_DIGEST, true,
	    false, &alpn_responder, look_at_tls },	/* RFC 8737 3 */
	{ "dns-account-01", account_txt_name, txt_digest, TXT_RECORD, true,
	    false, &dns_responder, look_at_dns },
	{ "dns-persist-01", persist_name, persist_value, TXT_RECORD, false,
	    true, &dns_responder, look_at_dns },
};

static const struct responder *responder;	/* the one of this step */

static const struct responder *
find_responder(Str type)
{
	const struct challenge_type *t = find_challenge_type(type);

	if (!t)
		usage("-l cannot answer % challenges, only: %", type,
		    NAMES_OF(challenge_types));
	return t->responder;
}

/*
 * accept() failed. If the system lacks descriptors (EMFILE, ENFILE) or memory
 * (ENOBUFS, ENOMEM), the peer keeps waiting, and accept() would fail again
 * immediately: pause. If this process has too many descriptors, let all peers
 * expire.
 */
static void
accept_failed(void)
{
	if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED)
		return;
	if (errno == EMFILE)
		for (size_t i = 0; i < CLIENTS; i++)
			clients[i].since -= PATIENCE * 1000 + 1;
	accept_after = now_ms() + RETRY;
}

static bool proxied;		/* -l proxy: */

/* Is one of two strings a prefix of the other? */
static bool
agree(Str a, Str b)
{
	size_t n = a.n < b.n ? a.n : b.n;

	return same((Str){ a.p, n }, (Str){ b.p, n });
}

/*
 * How many bytes of the header that a balancer sends first (The PROXY
 * protocol 2.1, 2.2) to read after s: 0 if s is all of it, -1 if s is not a
 * header. Nothing beyond it may be read: what follows is for HTTP or TLS.
 */
static int
header_needs(Str s)
{
	enum { LINE = 107, FIXED = 16 };	/* bytes of its two forms */
	size_t n = FIXED;

	if (s.n && agree(s, S("PROXY "))) {
		if (s.p[s.n - 1] == '\n')
			return 0;
		return s.n < LINE ? 1 : -1;
	}
	if (!agree(s, S("\r\n\r\n\0\r\nQUIT\n")))
		return -1;
	if (s.n >= FIXED)
		n += u16_at(s, FIXED - 2);
	if (n > REQUEST)
		return -1;
	return s.n ? (int)(n - s.n) : 1;
}

/* Begin to serve a peer, whose own bytes come next. */
static void
client_begin(const struct responder *how, struct client *c)
{
	c->begun = true;
	c->n = 0;
	if (how->begin)
		how->begin(c);
}

/* Read the header of the balancer before a peer's own bytes. */
static void
skip_header(const struct responder *how, struct client *c)
{
	ssize_t n = 1;
	int more;

	while ((more = header_needs((Str){ c->b, c->n })) > 0 &&
	    (n = read(c->fd, c->b + c->n, (size_t)more)) > 0)
		c->n += (size_t)n;
	if (more == 0)
		client_begin(how, c);
	else if (more < 0 || n == 0 || (errno != EAGAIN && errno != EINTR))
		client_close(c);
}

/* Accept a peer into a free slot, or in place of the oldest one. */
static void
client_accept(const struct responder *how, int listener)
{
	struct client *c = clients;
	int fd = accept(listener, NULL, NULL);

	if (fd < 0) {
		accept_failed();
		return;
	}
	for (struct client *d = clients; d < clients + CLIENTS; d++)
		if (c->fd >= 0 && (d->fd < 0 || d->since < c->since))
			c = d;
	if (c->fd >= 0)
		client_close(c);
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	c->fd = fd;
	c->since = now_ms();
	c->answered = c->begun = false;
	c->n = 0;
	if (!proxied)
		client_begin(how, c);
}

/* Serve a peer that has sent something. */
static void
client_serve(const struct responder *how, struct client *c)
{
	if (c->begun)
		how->serve(c);
	else
		skip_header(how, c);
}

/*
 * Disconnect peers that took too long. List the other open descriptors for
 * poll(), and whose they are: the number of a listener or, counted from
 * LISTENERS, of a peer. TCP listeners are left out during a pause. poll()
 * refuses a list longer than RLIMIT_NOFILE, even if places are unused.
 */
static size_t
list_open(struct pollfd *p, size_t *whose)
{
	size_t n = 0;

	for (size_t i = 0; i < LISTENERS; i++)
		if (listeners[i].fd >= 0 &&
		    (i % 2 || now_ms() >= accept_after)) {
			whose[n] = i;
			p[n++] = listeners[i];
		}
	for (size_t i = 0; i < CLIENTS; i++) {
		struct client *c = &clients[i];

		if (c->fd >= 0 && now_ms() - c->since > PATIENCE * 1000)
			client_close(c);
		if (c->fd >= 0) {
			whose[n] = LISTENERS + i;
			p[n++] = (struct pollfd){ c->fd, POLLIN, 0 };
		}
	}
	return n;
}

/* Serve peers until the step ends. */
static void
answer_peers(const struct responder *how)
{
	struct pollfd p[1 + LISTENERS + CLIENTS] = { { 0, POLLIN, 0 } };
	size_t whose[LISTENERS + CLIENTS], n;

	for (;;) {
		n = list_open(p + 1, whose);
		if (poll(p, 1 + n, now_ms() < accept_after ? RETRY :
		    1000) < 0) {	/* no memory, or too few files */
			sleep_for(RETRY);
			continue;
		}
		if (p[0].revents)
			return;
		for (size_t i = 0; i < n; i++) {
			size_t mark = used;

			if (!p[1 + i].revents)
				continue;
			if (whose[i] >= LISTENERS)
				client_serve(how,
				    &clients[whose[i] - LISTENERS]);
			else if (whose[i] % 2)
				how->datagram(p[1 + i].fd);
			else
				client_accept(how, p[1 + i].fd);
			used = mark;
		}
	}
}

/* ----------------------------------------------- 49. Responder process -- */

/* The process that answers, as the step sees it. */
static struct {
	volatile pid_t pid;		/* 0: there is none */
	int pipe;			/* it ends when this is closed */
} answering;

/*
 * End the responder. If kill() is not permitted, since its user is another
 * one, closing the pipe ends it.
 */
static void
stop_responder(const struct cleanup *d)
{
	(void)d;
	close(answering.pipe);
	if (!answering.pid)
		return;
	kill(answering.pid, SIGKILL);
	waitpid(answering.pid, NULL, 0);
	answering.pid = 0;
}

/*
 * SIGCHLD: without its responder no challenge can become valid, so the step
 * ends, before it asks the CA to validate or while it waits. Other children
 * are waited for by the code that started them.
 */
static void
on_child(int sig)
{
	unsigned char b[20];
	int status, error = errno;

	(void)sig;
	if (answering.pid &&
	    waitpid(answering.pid, &status, WNOHANG) == answering.pid) {
		answering.pid = 0;
		preamble = NONE;
		if (WIFSIGNALED(status))
			die(FAULT, "the responder was ended by signal %",
			    decimal((unsigned)WTERMSIG(status), b));
		die(FAULT, "the responder failed with status %",
		    decimal((unsigned)WEXITSTATUS(status), b));
	}
	errno = error;
}

/* Overwrite all that the step knows, except the challenges and -H. */
static void
forget_step(void)
{
	struct list lines = text_begin();
	const struct challenge *c;
	Str all;

	for (size_t i = 0; i < nresolved; i++)
		list_add(&lines, "\n", resolved[i]);
	for each(c, challenge)
		list_add(&lines, "\n", challenge_text(c));
	all = keep(0, list_text(&lines));
	wipe(heap + used, peak - used);
	for (size_t i = 0; i < nresolved; i++)
		resolved[i] = cut(&all, '\n');
	order.nchallenge = 0;
	while (all.n)
		set_value(keyword(S("challenge")), cut(&all, '\n'));
	wipe_environment();
	wipe_secrets();
	wipe_stack();
}

static void
limit_to_zero(int resource)
{
	const struct rlimit zero = { 0, 0 };

	if (prlimit(0, resource, &zero, NULL) != 0)
		die(FAULT, "cannot limit a process: %", why());
}

/*
 * Change from root to nobody. In a user namespace without nobody, or without
 * the capabilities, this is impossible, and the process stays root. libc's
 * functions would change all threads: code of 2 KB, for the only one.
 */
static void
give_up_root(void)
{
	if (geteuid() != 0 || (syscall(SYS_setgroups, 0, NULL) == 0 &&
	    syscall(SYS_setgid, NOBODY) == 0 &&
	    syscall(SYS_setuid, NOBODY) == 0))
		return;
	if (errno != EPERM && errno != EINVAL)
		die(FAULT, "cannot give up root: %",
		    why());
	if (verbose)
		warn("the responder cannot give up root: %", why());
}

static int last_descriptor;	/* none above it is open */

/*
 * Find last_descriptor, once. Later descriptors get the lowest free numbers,
 * and the step never has as many as SPARE of its own open.
 */
static void
find_descriptors(void)
{
	enum { SPARE = 64 };
	int fd = FILES;

	while (!last_descriptor && fd > 2 && fcntl(fd, F_GETFD) < 0)
		fd--;
	if (!last_descriptor)
		last_descriptor = fd + SPARE;
}

/*
 * Give up every right that serving peers does not need. Descriptors 0 to 2
 * become the pipe to the step, so that no peer gets such a number.
 * RLIMIT_NPROC must be set before the user changes: then Linux also refuses to
 * execute programs.
 */
static void
confine(int step_fd)
{
	find_descriptors();
	setsid();	/* no terminal: input could be put into it */
	limit_to_zero(RLIMIT_NPROC);
	give_up_root();
	if (chdir("/") != 0)
		die(FAULT, "cannot change to /: %", why());
	limit_to_zero(RLIMIT_CORE);
	limit_to_zero(RLIMIT_FSIZE);
	for (int fd = 0; fd < 3; fd++)
		if (dup2(step_fd, fd) != fd)
			leave(FAULT);
	for (int fd = 3; fd <= last_descriptor; fd++) {
		size_t i = 0;

		while (i < LISTENERS && listeners[i].fd != fd)
			i++;
		if (i == LISTENERS)
			close(fd);
	}
}

/*
 * The responder: it forgets what it does not need, serves peers, and ends
 * with the step, which alone cleans up and handles signals (here blocked).
 */
static void
run_responder(const struct responder *how, int step_fd)
{
	ncleanup = 0;
	on_record_pipe = false;
	forget_step();
	confine(step_fd);
	for (size_t i = 0; i < CLIENTS; i++)
		clients[i].fd = -1;
	if (how->begin)
		make_validations();
	answer_peers(how);
	leave(DONE);
}

static void
start_responder(const char *where)
{
	struct sigaction act = { .sa_handler = on_child,
	    .sa_flags = SA_RESTART | SA_NOCLDSTOP };
	int fds[2];
	sigset_t old;
	pid_t pid;

	(void)where;
	pid = start_process(fds, &old);
	if (pid == 0) {
		close(fds[1]);
		run_responder(responder, fds[0]);
	}
	sigfillset(&act.sa_mask);
	sigaction(SIGCHLD, &act, NULL);
	answering.pid = pid;
	answering.pipe = fds[1];
	add_cleanup(stop_responder, 0, NULL);
	sigdelset(&old, SIGCHLD);
	sigprocmask(SIG_SETMASK, &old, NULL);
	close(fds[0]);
	fcntl(fds[1], F_SETFD, FD_CLOEXEC);
	for (size_t i = 0; i < LISTENERS; i++) {
		if (listeners[i].fd >= 0)
			close(listeners[i].fd);
		listeners[i].fd = -1;
	}
}

/* -------------------------------------------------- 50. Look processes -- */

enum {
	LOOKS  = 8,		/* processes at once */
	LOOK   = 15,		/* seconds for each */
	REPORT = 8192		/* bytes; a line has about 80 */
};

/* The processes that look, each at a challenge, as the step sees them. */
static struct look {
	volatile pid_t pid;	/* 0: this place is free */
	int fd;			/* of its report, ... */
	size_t n;		/* ... and its length so far */
	size_t challenge;	/* its number in the order */
	unsigned char b[REPORT];
} looks[LOOKS];

static bool visible[NAMES];	/* the challenges that are seen everywhere */
static struct list not_seen;	/* what is reported of the others */

/*
 * The process: like the responder, it forgets what it does not need, and
 * gives up its rights. It ends at `end` at the latest, and writes what it
 * reads from others only to its report.
 */
static void
run_look(size_t i, long long end, int fd)
{
	long long most = now_ms() + LOOK * 1000;
	const struct challenge_type *t;

	ncleanup = 0;
	on_record_pipe = verbose = false;
	answering.pid = 0;
	forget_step();
	looking_for = order.challenge[i].id.value;
	t = find_challenge_type(order.challenge[i].type);
	confine(fd);
	conn.fd = -1;
	family = AF_UNSPEC;	/* -4 and -6 are for the CA alone */
	deadline = end < most ? end : most;
	end_by_signals();
	if (t)
		t->look(&order.challenge[i]);
	write_all(1, S(".\n"));
	leave(DONE);
}

static void
start_look(struct look *l, size_t i, long long end)
{
	sigset_t old;
	int fds[2];
	pid_t pid = start_process(fds, &old);

	if (pid == 0)
		run_look(i, end, fds[1]);
	l->fd = fds[0];
	l->n = 0;
	l->challenge = i;
	l->pid = pid;
	begin_reading(fds, &old);
}

static void
stop_look(struct look *l)
{
	if (!l->pid)
		return;
	close(l->fd);
	if (kill(l->pid, SIGKILL) == 0)	/* it can be another user's */
		waitpid(l->pid, NULL, 0);
	l->pid = 0;
}

static void
stop_looks(const struct cleanup *d)
{
	(void)d;
	for (size_t i = 0; i < LOOKS; i++)
		stop_look(&looks[i]);
}

/*
 * A look has ended. Its challenge is seen if the report is complete, with at
 * least one success and no failure.
 */
static void
end_look(struct look *l)
{
	Str all = { l->b, l->n }, entry = NONE;
	Str name = order.challenge[l->challenge].id.value;
	size_t good = 0, bad = 0;
	sigset_t old;

	block_signals(&old);
	stop_look(l);
	sigprocmask(SIG_SETMASK, &old, NULL);
	while (all.n) {
		entry = cut(&all, '\n');
		good += begins(entry, "+");
		if (begins(entry, "-")) {
			bad++;
			list_add(&not_seen, "; ", from(entry, 1));
		}
		if (verbose && !is(entry, "."))
			warn("%", from(entry, 1));
	}
	if (!is(entry, "."))
		list_add(&not_seen, "; ", text("%: no result in time", name));
	else if (!good && !bad)
		list_add(&not_seen, "; ", text("%: nothing of it can be "
		    "reached from here", name));
	else
		visible[l->challenge] = !bad;
}

/* Read more of the report of a look; false at its end, or if it is too long. */
static bool
read_report(struct look *l)
{
	ssize_t n = read(l->fd, l->b + l->n, REPORT - l->n);

	if (n > 0)
		l->n += (size_t)n;
	return n > 0 || (n < 0 && errno == EINTR);
}

/* Read the reports of looks until `end`; false if no look is running. */
static bool
await_reports(long long end)
{
	struct pollfd p[LOOKS];
	struct look *whose[LOOKS];
	size_t n = 0;
	long long ms = end - now_ms();
	int got;

	for (struct look *l = looks; l < looks + LOOKS; l++)
		if (l->pid) {
			whose[n] = l;
			p[n++] = (struct pollfd){ l->fd, POLLIN, 0 };
		}
	if (n == 0)
		return false;
	got = poll(p, n, ms > 0 ? (int)ms : 0);
	if (got < 0 && errno != EINTR)
		die(FAULT, "cannot wait for a process: %", why());
	for (size_t i = 0; got >= 0 && i < n; i++)
		if (got == 0 || (p[i].revents && !read_report(whose[i])))
			end_look(whose[i]);
	return true;
}

/* A free place for a look; NULL if there is none. */
static struct look *
free_look(void)
{
	for (struct look *l = looks; l < looks + LOOKS; l++)
		if (!l->pid)
			return l;
	return NULL;
}

/* Look once at all challenges not yet seen; have all been seen now? */
static bool
look_at_all(long long end)
{
	size_t next = 0;
	struct look *l;

	not_seen = list_begin();
	do
		while (next < order.nchallenge && (l = free_look())) {
			if (!visible[next])
				start_look(l, next, end);
			next++;
		}
	while (await_reports(end + 500));
	return not_seen.n == 0;
}

/*
 * respond -c: look at what is published until it is seen everywhere, or end
 * the step when the seconds are over.
 */
static void
await_published(unsigned long seconds)
{
	long long left = time_to_wait(), end, pause = 1000;
	size_t before = ncleanup, mark = used;

	if (left > (long long)seconds * 1000)
		left = (long long)seconds * 1000;
	end = now_ms() + left;
	find_descriptors();
	add_cleanup(stop_looks, 0, NULL);
	for (;;) {
		doing(LATER, "looking at what is published (-c)", "");
		used = mark;
		if (look_at_all(end))
			break;
		if (now_ms() + pause < end && pause_for("waiting for what is "
		    "published to be seen everywhere (-c)", pause)) {
			pause = pause * 3 / 2 < LAST_PAUSE ? pause * 3 / 2 :
			    LAST_PAUSE;
			continue;
		}
		remedy = S("; the CA was not asked to validate");
		die(LATER, "not yet: %", list_text(&not_seen));
	}
	clean_up_to(before);
}

/* ------------------------------------------------------- 51. Listening -- */

/* A bound socket, which listens if it is TCP; -1 and errno on failure. */
static int
bind_to(const struct address *a, int type)
{
	int fd = socket(a->to.any.sa_family, type, 0), on = 1;

	if (fd < 0)
		return -1;
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	/* Not for UDP (length 0 fails): programs could share the port. */
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, type == SOCK_STREAM ?
	    sizeof on : 0);
	if (a->to.any.sa_family == AF_INET6) {
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
		setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
	} else
		setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof on);
	if (bind(fd, &a->to.any, a->n) == 0 &&
	    (type != SOCK_STREAM || listen(fd, CLIENTS) == 0))
		return fd;
	on = errno;
	close(fd);
	errno = on;
	return -1;
}

/*
 * Find all addresses of the host of -l; without a host, the wildcard address
 * of each family. -4 and -6 apply to connecting only.
 */
static void
find_own_addresses(Str host)
{
	static const unsigned char any[16];
	size_t mark = ncleanup;
	int connecting = family;

	family = AF_UNSPEC;
	begin_way();
	if (host.n) {
		doing(NO_PLACE, "looking up the address of", c_str(host));
		find_addresses(c_str(host));
	} else {
		add_ip((Str){ any, 16 });
		add_ip((Str){ any, 4 });
	}
	while (is_looking_up())
		poll_way(NEVER);
	clean_up_to(mark);
	family = connecting;
}

/* Listen on one address of each family that was found, or end the step. */
static void
listen_on_addresses(const struct responder *how, Str where, in_port_t port)
{
	struct address *a;
	bool any = false;

	while ((a = next_address())) {
		struct pollfd *l = &listeners[a->to.any.sa_family == AF_INET ?
		    0 : 2];

		if (l->fd >= 0)
			continue;
		set_port(a, port);
		l[0].fd = bind_to(a, SOCK_STREAM);
		if (l[0].fd >= 0 && how->datagram)
			l[1].fd = bind_to(a, SOCK_DGRAM);
		if (l[0].fd >= 0 && (!how->datagram || l[1].fd >= 0))
			any = true;
		else if (errno != EAFNOSUPPORT && errno != EADDRNOTAVAIL)
			break;
	}
	if (!a && any)
		return;
	if (errno == EADDRINUSE)
		remedy = S("; stop the program that listens there, or let it "
		    "answer (see -w)");
	if (errno == EACCES)
		remedy = S("; ports below 1024 need root");
	die(NO_PLACE, "cannot listen on %: %", where, why());
}

/*
 * Listen on [proxy:][HOST:]PORT, in each family that the machine has, before
 * the CA is asked to validate.
 */
static void
listen_at(const struct responder *how, const char *where)
{
	Str port = str(where), host;
	unsigned long n;

	proxied = begins(port, "proxy:");
	if (proxied)
		port = from(port, 6);
	if (proxied && how->datagram)
		usage("-l proxy: is for http-01 and tls-alpn-01");
	host = contains(port, S(":")) ? take_host(&port) : NONE;
	for (size_t i = 0; i < LISTENERS; i++)
		listeners[i] = (struct pollfd){ -1, POLLIN, 0 };
	if (host.n > HOSTNAME || !number(port, MAX_PORT, &n) || n == 0)
		usage("-l needs [proxy:][HOST:]PORT, not %",
		    str(where));
	find_own_addresses(host);
	if (!has_untried())
		die(NO_PLACE, "cannot listen on %: %", str(where),
		    no_address());
	listen_on_addresses(how, str(where), htons((in_port_t)n));
}

/* -l answers one type of challenge, and only within a step: not with -B. */
static void
prepare_responder(const char *where, const char *type)
{
	if (!type)
		usage("-l needs -t, unless the record has challenge lines "
		    "of exactly one type");
	if (boxed)
		usage("-l cannot be used with -B");
	responder = find_responder(str(type));
	listen_at(responder, where);
}

/* ----------------------------------------------------- 52. Hook styles -- */

/*
 * With -x programs publish challenges and clean up. They are called in one of
 * the styles for which scripts already exist.
 */
enum {
	HOOK_ARGS = 8,		/* words of a call; uacme has 6 */
	HOOK_VARS = 12,		/* variables that we add */
	HOOK_ENV  = 1024,	/* variables in all */
	HOOK_SAYS = 4096,	/* bytes of output that certbot passes on */
	GRACE     = 15		/* seconds for all clean-up after -T */
};

static const struct hook_style *hook_style;
static const char *hook_program, *hook_cleanup;	/* the latter: certbot's */
static bool validated;		/* the CA has validated all challenges */

static struct hook {
	const char *call[2][HOOK_ARGS];	/* to publish and to clean up */
	const char *vars[HOOK_VARS + 1];
	size_t nvars;
} hooks[NAMES];

static char *hook_env[HOOK_ENV];

/* Add a variable to the environment of a hook. */
static void
hook_var(struct hook *h, const char *name, Str value)
{
	h->vars[h->nvars++] = c_str(text("%=%", str(name), value));
}

/* Our environment with the variables of a hook. */
static char **
hook_environment(const struct hook *h)
{
	size_t n = 0;

	for (size_t i = 0; i < h->nvars; i++)
		hook_env[n++] = (char *)h->vars[i];
	for (char **e = environ; *e; e++) {
		size_t i = 0, length = strcspn(*e, "=") + 1;

		while (i < h->nvars && strncmp(*e, h->vars[i], length) != 0)
			i++;
		if (n == HOOK_ENV - 1)
			die(FAULT, "more than % environment variables",
			    num(HOOK_ENV));
		if (i == h->nvars)
			hook_env[n++] = *e;
	}
	hook_env[n] = NULL;
	return hook_env;
}

/* Set the words of a call. */
#define set_call(call, ...)  set_words(call, STRS(__VA_ARGS__))

static void
set_words(const char **call, size_t n, ...)
{
	va_list ap;

	va_start(ap, n);
	while (n-- > 0)
		*call++ = c_str(va_arg(ap, Str));
	va_end(ap);
	*call = NULL;
}

/* The digest of tls-alpn-01 has colons between its bytes. */
static void
dehydrated_hook(struct hook *h, const struct challenge *c, Str token)
{
	Str value = c->content, rest = value;

	if (publishes(c, CERT_DIGEST))
		for (value = NONE; rest.n; rest = from(rest, 2))
			value = cat(value, value.n ? S(":") : NONE,
			    (Str){ rest.p, 2 });
	set_call(h->call[0], str(hook_program), S("deploy_challenge"),
	    bare(c->id.value), token, value);
	set_call(h->call[1], str(hook_program), S("clean_challenge"),
	    bare(c->id.value), token, value);
}

/* A digest is in base64url here, for tls-alpn-01 too. */
static void
uacme_hook(struct hook *h, const struct challenge *c, Str token)
{
	Str auth = publishes(c, CERT_DIGEST) ? b64(unhex(c->content)) :
	    c->content;

	set_call(h->call[0], str(hook_program), S("begin"), c->type,
	    bare(c->id.value), token, auth);
	set_call(h->call[1], str(hook_program), S("failed"), c->type,
	    bare(c->id.value), token, auth);
}

static void
lego_hook(struct hook *h, const struct challenge *c, Str token)
{
	Str name = text("%.", c->name);

	(void)token;
	set_call(h->call[0], str(hook_program), S("present"), name, c->content);
	set_call(h->call[1], str(hook_program), S("cleanup"), name, c->content);
}

/* The names that have challenges, separated by commas. */
static Str
all_names(void)
{
	struct list all = text_begin();
	const struct challenge *c;

	for each(c, challenge)
		list_add(&all, ",", bare(c->id.value));
	return list_text(&all);
}

static void
certbot_hook(struct hook *h, const struct challenge *c, Str token)
{
	static const char *all;		/* one for all hooks: it is long */

	(void)token;
	set_call(h->call[0], str(hook_program));
	set_call(h->call[1], str(hook_cleanup));
	hook_var(h, "CERTBOT_DOMAIN", bare(c->id.value));
	hook_var(h, "CERTBOT_IDENTIFIER", bare(c->id.value));
	hook_var(h, "CERTBOT_VALIDATION", c->content);
	if (!all)
		all = c_str(text("CERTBOT_ALL_DOMAINS=%", all_names()));
	h->vars[h->nvars++] = all;
	hook_var(h, "CERTBOT_REMAINING_CHALLENGES",
	    num(order.nchallenge - 1 - (size_t)(h - hooks)));
	if (publishes(c, FILE_TOKEN))
		hook_var(h, "CERTBOT_TOKEN", c->name);
}

static const struct hook_style {
	char name[11];
	void (*make)(struct hook *, const struct challenge *, Str token);
	bool needs_token;	/* of every challenge */
	bool only_txt;		/* answers only challenges in DNS */
	bool may_decline;	/* failing to publish is not an error */
	bool passes_output;	/* of publishing to the clean-up */
	char if_valid[5];	/* in place of "failed" once all are valid */
} hook_styles[] = {
	{ "dehydrated", dehydrated_hook, .needs_token = true },
	{ "uacme", uacme_hook, .needs_token = true, .may_decline = true,
	    .if_valid = "done" },
	{ "lego", lego_hook, .only_txt = true },
	{ "certbot", certbot_hook, .passes_output = true },
};

static Str
hook_style_names(void)
{
	return NAMES_OF(hook_styles);
}

/* -x [STYLE:]PROGRAM; for certbot AUTH,CLEANUP. */
static void
choose_hook(const char *value)
{
	Str s = str(value), name = cut(&s, ':');

	hook_style = &hook_styles[0];
	hook_program = value;
	for (size_t i = 0; i < COUNT(hook_styles); i++)
		if (same(name, str(hook_styles[i].name)) &&
		    value[name.n] == ':') {
			hook_style = &hook_styles[i];
			hook_program = value + name.n + 1;
		}
	if (hook_program == value && value[name.n] == ':' && is_b64(name))
		usage("no such hook style: %; there are %", name,
		    hook_style_names());
	name = cut(&s, ',');
	if (!*hook_program || (hook_style->passes_output && (!name.n || !s.n)))
		usage("-x needs [STYLE:]PROGRAM or certbot:AUTH,CLEANUP, "
		    "not %", str(value));
	if (!hook_style->passes_output)
		return;
	hook_program = c_str(name);
	hook_cleanup = (const char *)s.p;
}

/* ----------------------------------------------------------- 53. Hooks -- */

/* May this user execute the file? If not, errno says why. */
static bool
can_run(const char *file)
{
	struct stat st;

	if (access(file, X_OK) != 0 || stat(file, &st) != 0)
		return false;
	errno = EACCES;
	return S_ISREG(st.st_mode);
}

/* The path of a program, which can be in PATH; NULL, with errno, if none. */
static const char *
find_program(const char *name)
{
	Str path = str(getenv("PATH")), dir;
	int cause = ENOENT;

	if (strchr(name, '/'))
		return can_run(name) ? name : NULL;
	while (path.n) {
		const char *file;

		dir = cut(&path, ':');
		file = c_str(text("%/%", dir.n ? dir : S("."), str(name)));
		if (can_run(file))
			return file;
		if (access(file, F_OK) == 0)
			cause = EACCES;
	}
	errno = cause;
	return NULL;
}

/* End the step if a hook cannot be run, before the CA is asked to validate. */
static void
check_program(const char *name)
{
	Str cause;
	const char *hint = "";

	if (find_program(name))
		return;
	cause = why();
	if (errno == EACCES)
		hint = "; is it executable (chmod +x)?";
	else if (strchr(name, ' '))
		hint = "; -x needs a program without arguments";
	else if (!strchr(name, '/')) {
		cause = S("not found in PATH");
		hint = "; a file in this directory is named with ./";
	}
	remedy = str(hint);
	die(NO_PLACE, "cannot run the hook %: %", str(name), cause);
}

static void
check_hook(void)
{
	check_program(hook_program);
	if (hook_cleanup)
		check_program(hook_cleanup);
}

/* In a new process: execute the hook. */
static void
hook_exec(const struct hook *h, const char *const *call, int says)
{
	const char *file = find_program(call[0]);

	become_child();
	setpgid(0, 0);
	environ = hook_environment(h);
	if (dup2(says, 1) == 1 && file)
		execv(file, (char *const *)call);
	leave(127);
}

static pid_t
hook_start(const struct hook *h, const char *const *call, int says)
{
	pid_t pid = fork();

	if (pid == 0)
		hook_exec(h, call, says);
	if (pid > 0)
		setpgid(pid, pid);
	return pid;
}

/*
 * When a hook that cleans up is killed: all of them share the rest of -T, or
 * GRACE seconds if that is more, but each has at least a second.
 */
static long long
clean_up_deadline(void)
{
	static long long end;
	long long now = now_ms();

	if (!end)
		end = now + GRACE * 1000;
	if (end < deadline)
		end = deadline;
	return end > now + 1000 ? end : now + 1000;
}

/* Clean up one challenge. Signals are blocked, so the hook has a limit. */
static void
hook_clean_up(const struct cleanup *d)
{
	const struct hook *h = d->p;
	long long until = clean_up_deadline();
	pid_t pid;
	int status = -1;

	if (validated && *hook_style->if_valid)
		hooks[h - hooks].call[1][1] = hook_style->if_valid;
	doing(LATER, "running the hook", h->call[1][0]);
	pid = hook_start(h, h->call[1], 2);
	while (pid > 0 && waitpid(pid, &status, WNOHANG) == 0) {
		if (now_ms() > until) {
			kill(-pid, SIGKILL);
			waitpid(pid, &status, 0);
		} else
			sleep_for(20);
	}
	if (status != 0)
		warn_later("the hook % failed to clean up %",
		    str(h->call[1][0]), str(h->vars[2] + sizeof "ACME_NAME"));
}

/* Wait for output of a hook; false if it has ended and none is left. */
static bool
hook_has_output(int fd, pid_t pid)
{
	struct pollfd p = { fd, POLLIN, 0 };
	siginfo_t ended;

	do {
		ended.si_pid = 0;
		waitid(P_PID, (id_t)pid, &ended, WEXITED | WNOHANG | WNOWAIT);
		if (wait_for(&p, ended.si_pid ? 0 : 20) > 0)
			return true;
	} while (!ended.si_pid);
	return false;
}

/*
 * All output of a hook, without newlines at its end. Processes that it leaves
 * behind may hold the pipe open, so only the hook itself is waited for.
 */
static Str
hook_output(int fd, pid_t pid)
{
	Str s = { heap + used, 0 };
	unsigned char b[256];
	size_t n;

	while (hook_has_output(fd, pid) &&
	    (n = read_some(fd, b, sizeof b, "the hook's output")) > 0) {
		if (s.n + n > HOOK_SAYS)
			die(FAULT, "the hook % printed more than % bytes",
			    str(hook_program), num(HOOK_SAYS));
		s = cat(s, (Str){ b, n });
	}
	while (s.n && s.p[s.n - 1] == '\n')
		s.n--;
	return s;
}

/* Set the calls and variables of a hook for a challenge. */
static void
hook_make(struct hook *h, const struct challenge *c, Str token)
{
	if (hook_style->only_txt && !publishes(c, TXT_RECORD))
		usage("% hooks answer only DNS challenges, not %",
		    str(hook_style->name), c->type);
	*h = (struct hook){ .nvars = 0 };
	hook_var(h, "ACME_TYPE", c->type);
	hook_var(h, "ACME_IDENTIFIER", c->id.value);
	hook_var(h, "ACME_NAME", c->name);
	hook_var(h, "ACME_CONTENT", c->content);
	hook_style->make(h, c, token);
}

/*
 * Publish one challenge; false if the hook declines it, which only some
 * styles allow. Clean-up is registered, unless the hook exits with an error.
 */
static bool
hook_publish(struct hook *h, const struct challenge *c, Str token)
{
	int fds[2] = { -1, 2 }, status;
	sigset_t old;
	pid_t pid;

	hook_make(h, c, token);
	doing(LATER, "running the hook", hook_program);
	if (hook_style->passes_output && pipe(fds) != 0)
		die(FAULT, "cannot make a pipe: %", why());
	if (fds[0] >= 0) {
		fcntl(fds[0], F_SETFD, FD_CLOEXEC);
		fcntl(fds[1], F_SETFD, FD_CLOEXEC);
	}
	block_signals(&old);
	if ((pid = hook_start(h, h->call[0], fds[1])) < 0)
		cannot_start();
	add_cleanup(hook_clean_up, 0, h);
	add_cleanup(stop_group, pid, NULL);
	sigprocmask(SIG_SETMASK, &old, NULL);
	if (fds[0] >= 0) {
		close(fds[1]);
		hook_var(h, "CERTBOT_AUTH_OUTPUT", hook_output(fds[0], pid));
		close(fds[0]);
	}
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		continue;
	cancel_cleanup();
	if (status == 0)
		return true;
	if (WIFEXITED(status))
		cancel_cleanup();
	if (hook_style->may_decline && WIFEXITED(status) &&
	    WEXITSTATUS(status) < 126)
		return false;
	die(NO_PLACE, "the hook % % for %", str(hook_program), ending(status),
	    c->id.value);
	return false;
}

/*
 * The token of a challenge, if the style needs one. Only an http-01 line has
 * it; else it comes from a fetched authorization, or the CA is asked.
 */
static Str
fetch_token(const struct challenge *c)
{
	struct response r;
	Str token;

	if (publishes(c, FILE_TOKEN) || !hook_style->needs_token)
		return c->name;
	if (is_b64(c->token))
		return c->token;
	r = acme_post(c->url, NONE);
	token = member(&r, json_body(&r), "token", '"');
	if (token.n && !is_b64(token))
		broken(&r, "has an invalid token: %", brief(token));
	return token;
}

/*
 * Publish by hooks. Of several challenges for a name the first one that is
 * not declined is kept.
 */
static void
publish_by_hooks(const char *hook)
{
	static struct identifiers names;
	bool done[NAMES] = { false };
	const struct challenge *c;
	size_t kept = 0, at;

	(void)hook;
	for each(c, challenge) {
		at = add_identifier(&names, &c->id);
		if (done[at])
			continue;
		done[at] = hook_publish(&hooks[kept], c, fetch_token(c));
		if (done[at])
			order.challenge[kept++] = *c;
	}
	for (at = 0; at < names.n; at++)
		if (!done[at])
			die(REFUSED, "the hook % declined every challenge for "
			    "%", str(hook_program), names.id[at].value);
	order.nchallenge = kept;
}

/*
 * The order became ready after its record was written: an earlier run has
 * responded. It may have been killed, so the hooks are called to clean up.
 */
static void
clean_up_by_hooks(const char *type)
{
	size_t before = ncleanup;
	const struct challenge *c;
	struct hook *h = hooks;

	add_validated(type);
	for each(c, challenge) {
		if (hook_style->only_txt && !publishes(c, TXT_RECORD))
			continue;
		hook_make(h, c, fetch_token(c));
		if (hook_style->passes_output)
			hook_var(h, "CERTBOT_AUTH_OUTPUT", NONE);
		add_cleanup(hook_clean_up, 0, h++);
	}
	validated = true;
	clean_up_to(before);
	order.nchallenge = 0;
}

/* ------------------------------------------------------ 54. Publishing -- */

/* The type of all challenges of the record; NULL if they have several. */
static const char *
record_type(void)
{
	Str type = NONE;
	const struct challenge *c;

	for each(c, challenge) {
		if (type.n && !same(type, c->type))
			return NULL;
		type = c->type;
	}
	return type.n ? c_str(type) : NULL;
}

static const char *
files_type(void)
{
	return "http-01";
}

static void
check_files(const char *dir_name, const char *type)
{
	(void)dir_name;
	if (type && strcmp(type, files_type()) != 0)
		usage("-w is for http-01, not for %", str(type));
}

static void
check_responder(const char *where, const char *type)
{
	(void)where;
	if (type)
		find_responder(str(type));
}

static void
check_hooks(const char *hook, const char *type)
{
	(void)type;
	choose_hook(hook);
}

static void
prepare_hooks(const char *hook, const char *type)
{
	(void)hook;
	(void)type;
	check_hook();
}

/*
 * Ways to publish: options of respond. What publish() does is undone by the
 * clean-up actions that it registers, unless the step ends to wait for -B.
 */
static const struct publisher {
	int letter;		/* of the option, whose value is `value` */
	const char *(*type)(void);	/* without -t; NULL if it can be any */
	/* Do the options go together? */
	void (*check)(const char *value, const char *type);
	/* Get ready, or end the step, before challenges are fetched. */
	void (*prepare)(const char *value, const char *type);
	void (*publish)(const char *value);
	/* Remove what an earlier run that was killed left, if ... */
	void (*clean_passed)(const char *value); /* the order was ready, */
	void (*clean_ready)(const char *type);	/* it became ready, */
	void (*clean_names)(const char *value);	/* or some names are done */
} publishers[] = {
	{ 'w', files_type, check_files, NULL, publish_files,
	    clean_up_files, NULL, remove_leftovers },
	{ 'l', record_type, check_responder, prepare_responder,
	    start_responder, NULL, NULL, NULL },
	{ 'x', NULL, check_hooks, prepare_hooks, publish_by_hooks,
	    NULL, clean_up_by_hooks, NULL },
};

/* ---------------------------------------------------- 55. Finalization -- */

/* A certificate must not have the account key (RFC 8555 11.1). */
static void
not_of_account(const char *file, Str key)
{
	if (same(key, public_key(signer())))
		die(BAD, "% contains the account key; use another key for "
		    "the certificate (RFC 8555 11.1)", file_name(file));
}

/* The names of the order as GeneralNames. */
static Str
record_names(void)
{
	struct list names = text_begin();
	const struct identifier *id;

	for each(id, identifier)
		list_add(&names, "", general_name(id));
	return list_text(&names);
}

/* Read the key for our own CSR; returns its public key. */
static Str
read_csr_key(const char *file)
{
	Str key;

	key_read(&other_key, file);
	key = public_key(&other_key);
	not_of_account(file, key);
	return key;
}

/*
 * Add the common name of a CSR to its names, if it is one; it can be there
 * already. A word without a dot is only taken for a name if there are no
 * others.
 */
static void
add_common_name(struct cert *csr)
{
	Str cn = common_name(csr->subject), ip = ip_bytes(cn);
	struct identifier id = canonical(ip.n ? S("ip") : S("dns"), cn);

	if (is_name(id.type, id.value) &&
	    (!csr->alt_names.n || ip.n || contains(cn, S("."))))
		csr->alt_names = cat(NONE, csr->alt_names, general_name(&id));
}

/* Read a CSR, PEM or DER, with all of its names. */
static void
read_csr(const char *file, struct cert *csr)
{
	Str s = read_file(file), rest = s, label, block = s;
	bool bad, genuine = false;

	while (pem_next(&rest, &label, &block, &bad))
		if (is(label, "CERTIFICATE REQUEST") ||
		    is(label, "NEW CERTIFICATE REQUEST"))
			break;
		else
			block = s;
	if (!csr_read(block, csr, &genuine))
		die(BAD, "% is not a certificate request (PEM or DER)",
		    file_name(file));
	if (!genuine)
		die(BAD, "the signature of the certificate request % is not "
		    "by its key", file_name(file));
	not_of_account(file, csr->public_key);
	add_common_name(csr);
}

static struct cert issued[CERTS];

/* Is this one of the first n certificates? */
static bool
has_certificate(size_t n, Str whole)
{
	while (n > 0)
		if (same(issued[--n].der, whole))
			return true;
	return false;
}

/*
 * Read the certificates of a response into issued[], and count them. It must
 * hold nothing else (RFC 8555 7.4.2, 11.4). Some CAs repeat one; it counts
 * once.
 */
static size_t
read_chain(const struct response *r)
{
	Str rest = r->body, label, block;
	size_t n = 0;
	bool bad;

	while (pem_next(&rest, &label, &block, &bad)) {
		if (!is(label, "CERTIFICATE"))
			broken(r, "has a PEM block % in its chain; only "
			    "CERTIFICATE is allowed", label);
		if (has_certificate(n, block))
			continue;
		if (n == CERTS)
			die(FAULT, "the chain has more than % certificates",
			    num(CERTS));
		if (!cert_read(block, &issued[n]))
			broken(r, "has a malformed certificate in its chain");
		if (n && !same(issued[n - 1].issuer, issued[n].subject))
			broken(r, "has a chain in which one certificate "
			    "was not issued by the next");
		n++;
	}
	if (bad || n == 0)
		broken(r, "is not a PEM certificate chain");
	return n;
}

/*
 * How the names of a certificate differ from the identifiers of the order,
 * for a message; NONE if they do not.
 */
static Str
names_differ(const struct cert *c)
{
	struct identifiers *asked = identifiers();
	bool seen[NAMES] = { false };
	struct identifier name;
	Str list = c->alt_names, extra = NONE;

	while (cert_name(&list, &name))
		if (has_identifier(&name))
			seen[add_identifier(asked, &name)] = true;
		else if (!extra.n)
			extra = text("has %, which is not asked for",
			    brief(name.value));
	for (size_t i = 0; i < asked->n; i++)
		if (!seen[i])
			return text("lacks %", brief(asked->id[i].value));
	return extra;
}

/* The common name of a chain's topmost issuer. */
static Str
top_issuer(size_t n)
{
	return common_name(issued[n - 1].issuer);
}

/*
 * Read the chain with a topmost issuer: from *r, or from an alternate in its
 * Link headers, which then replaces *r (RFC 8555 7.4.2). If there is none, the
 * step ends; the order stays valid.
 */
static size_t
choose_chain(struct response *r, const char *issuer)
{
	struct response first = *r;
	struct links links = begin_links(&first);
	struct list all = list_begin();
	size_t n = read_chain(r);

	while (!same(top_issuer(n), str(issuer))) {
		Str url;

		list_add(&all, ", ", brief(top_issuer(n)));
		url = next_link(&links, S("alternate"));
		if (!url.n)
			die(REFUSED, "no chain has the topmost issuer '%', "
			    "only: %; without -i the first is printed",
			    str(issuer), list_text(&all));
		*r = acme_post(url, NONE);
		n = read_chain(r);
	}
	return n;
}

/*
 * Download, check and print the certificate. It must be for `key`, unless
 * that is NONE; if it is not, the step exits with `status`.
 */
static void
print_certificate(const char *issuer, Str key, int status)
{
	struct response r;
	Str all = NONE, fault;
	size_t n;

	if (!order.certificate.n)
		die(BROKEN, "the order is % and has no certificate: %",
		    status_text(&order.status), need("order"));
	r = acme_post(order.certificate, NONE);
	n = issuer ? choose_chain(&r, issuer) : read_chain(&r);
	if (key.n && !same(issued[0].public_key, key))
		die(status, "the certificate at % is for another key%", r.url,
		    status == BAD ? S("; use the key it was finalized with, "
		    "or place a new order") : NONE);
	fault = names_differ(&issued[0]);
	if (fault.n)
		broken(&r, "is a certificate whose names differ from the "
		    "order's: it %", fault);
	for (size_t i = 0; i < n; i++)
		all = cat(NONE, all, pem(issued[i].der, "CERTIFICATE"));
	print(all);
}

/*
 * Send the CSR (RFC 8555 7.4). The CA may respond that the order is not ready,
 * because it is finished or not yet settled: then its new status decides what
 * to do. Returns whether the CA accepted this CSR.
 */
static bool
send_request(Str csr)
{
	struct post p = { .url = need("finalize"),
	    .payload = text("{\"csr\":\"%\"}", b64(csr)), .made = true };
	struct response r;

	acme_batch(&p, &r, 1);
	if (!has_type(&r, "orderNotReady")) {
		accept_response(&r);
		order_store(&r);
		if (order.status == PROCESSING)
			order_await(PROCESSING, "waiting for the certificate",
			    r.retry_after);
		return true;
	}
	order_refresh();
	if (order.status == READY &&
	    !pause_for("waiting for the order to settle", 1000))
		accept_response(&r);
	return false;
}

/* ---------------------------------------------------- 56. Key commands -- */

static const char *opt[128];	/* by letter; "": no value; NULL: not given */
static const char *contact[CONTACTS];	/* -m */
static size_t ncontact;

/* -m, which can be repeated. */
static void
add_contact(const char *value)
{
	if (ncontact == CONTACTS)
		die(FAULT, "more than % contacts", num(CONTACTS));
	if (*value && !strchr(value, ':'))
		usage("-m needs a URL such as mailto:you@example.com, not %",
		    str(value));
	contact[ncontact++] = value;
}

/* -H, which can be repeated, too. */
static void
add_resolve(const char *value)
{
	add_resolved(str(value));
}

static Str
key_type_names(void)
{
	return NAMES_OF(key_types);
}

static const struct key_type *
key_type(const char *name)
{
	for (size_t i = 0; i < COUNT(key_types); i++)
		if (!name || strcmp(name, key_types[i].name) == 0)
			return &key_types[i];
	usage("no such key type: %; there are %", str(name),
	    key_type_names());
}

/* key [-t TYPE] -o FILE */
static void
do_key(char **arg)
{
	(void)arg;
	doing(LATER, "making a key", "");
	key_make(&other_key, key_type(opt['t']));
	print(key_pem(&other_key));
}

/* A remedy for an argument that is not a name. */
static const char *
name_hint(Str s)
{
	if (begins(s, "-"))
		return "; options go before names";
	if (contains(s, S("://")))
		return "; give the host's name alone, not a URL";
	if (contains(s, S(",")))
		return "; separate names with spaces";
	for (size_t i = 0; i < s.n; i++)
		if (s.p[i] > 0x7f)
			return "; give its ASCII form (xn--...), which the "
			    "command idn2 prints";
	return "";
}

/* Add a name to the order, if it is not there. */
static void
add_name(const struct identifier *id)
{
	if (has_identifier(id))
		return;
	if (order.nidentifier == NAMES)
		die(FAULT, "more than % names", num(NAMES));
	set_value(keyword(S("identifier")), identifier_text(id));
}

/* Add names from the command line to the order, each once. */
static void
take_names(char **arg)
{
	for (; *arg; arg++) {
		Str name = str(*arg), ip = ip_bytes(name);
		struct identifier id;

		/* A trailing dot belongs to DNS, not to a certificate. */
		if (!ip.n && name.n > 1 && name.p[name.n - 1] == '.')
			name.n--;
		id = canonical(ip.n ? S("ip") : S("dns"), name);
		if (!is_name(id.type, name))
			usage("'%' is neither a DNS name nor an IP address%",
			    brief(name), str(name_hint(name)));
		add_name(&id);
	}
}

static void
check_csr(char **arg)
{
	size_t n = 0;

	(void)arg;
	for (const char *s = opt['N']; s && *s; s++)
		n += ((unsigned char)*s & 0xc0) != 0x80;
	if (n > COMMON)
		usage("-N accepts at most % characters", num(COMMON));
	if (!is_line(str(opt['N'])))
		usage("-N accepts text in UTF-8 without control characters");
}

/* csr -K KEY [-N NAME] NAME... (RFC 2986) */
static void
do_csr(char **arg)
{
	take_names(arg);
	key_read(&other_key, opt['K']);
	print(pem(csr_der(&other_key, record_names(), str(opt['N'])),
	    "CERTIFICATE REQUEST"));
}

/* The first certificate in a text, PEM or DER; false if it has none. */
static bool
find_certificate(Str s, struct cert *c)
{
	Str rest = s, label, block;
	bool bad;

	while (pem_next(&rest, &label, &block, &bad))
		if (is(label, "CERTIFICATE")) {
			s = block;
			break;
		}
	return cert_read(s, c);
}

static void
read_certificate(const char *file, struct cert *c)
{
	if (!find_certificate(read_file(file), c))
		die(BAD, "no certificate in %", file_name(file));
}

/*
 * When to renew: with a third of the life of the certificate left, or with
 * half of a life under ten days.
 */
static long long
renewal_time(const struct cert *c)
{
	long long life = c->not_after - c->not_before;

	return c->not_after - life / (life < 10 * 86400 ? 2 : 3);
}

/* Print the answer of due with its reason, and end the step. */
static void
due_answer(const char *file, bool due, Str reason)
{
	print(cat(NONE, due ? S("due: ") : S("not due: "),
	    shown(file_name(file)), S(" "), shown(reason), S("\n")));
	if (!due)
		answer_no();
	leave(DONE);
}

/* due [-K KEY] CERT [NAME...] */
static void
do_due(char **arg)
{
	long long now = now_seconds();
	struct cert c;
	Str fault = NONE, content;

	take_names(arg + 1);
	if (opt['K'])
		key_read(&other_key, opt['K']);
	content = read_if_there(arg[0]);
	if (!content.n)
		due_answer(arg[0], true, S("is missing or empty"));
	if (!find_certificate(content, &c))
		due_answer(arg[0], true, S("is not a certificate"));
	if (opt['K'] && !same(c.public_key, public_key(&other_key)))
		due_answer(arg[0], true, text("does not match the key %",
		    file_name(opt['K'])));
	if (arg[1])
		fault = names_differ(&c);
	if (fault.n)
		due_answer(arg[0], true, fault);
	if (now > c.not_after)
		due_answer(arg[0], true, text("expired at %",
		    date(c.not_after)));
	if (now < c.not_before)
		due_answer(arg[0], false, text("is not valid before %, and "
		    "the clock here shows %", date(c.not_before), date(now)));
	due_answer(arg[0], now >= renewal_time(&c), text("is valid until %, "
	    "to be renewed from %", date(c.not_after),
	    date(renewal_time(&c))));
}

/* thumbprint (RFC 7638) */
static void
do_thumbprint(char **arg)
{
	(void)arg;
	print(text("%\n", thumbprint(signer())));
}

/* A string as text, any other value as JSON. */
static Str
plain(Str v)
{
	return json_kind(v) == '"' ? json_text(v) : v;
}

/* One step along a path: a member by name, or an element by number. */
static Str
json_step(Str v, Str name)
{
	unsigned long n = 0, i = 0;
	Str key, value;

	if (json_kind(v) != '{' &&
	    (json_kind(v) != '[' || !number(name, LONG_MAX, &n) ||
	    (name.n > 1 && name.p[0] == '0')))
		return NONE;
	while (json_each(&v, &key, &value))
		if (key.n ? same(json_text(key), name) : i++ == n)
			return value;
	return NONE;
}

/* json PATH [FILE] */
static void
do_json(char **arg)
{
	Str item = read_file(arg[1]), v, path = str(arg[0]), none, s;

	if (!json_read(item, &v))
		die(BAD, "% is not JSON", file_name(arg[1]));
	if (!is(path, "."))
		do
			v = json_step(v, cut(&path, '.'));
		while (path.n && v.n);
	if (!v.n)
		die(NO, "% has nothing at '%'", file_name(arg[1]),
		    str(arg[0]));
	if (json_kind(v) != '[')
		print(text("%\n", plain(v)));
	else {		/* line upon line on top of the heap */
		s = (Str){ heap + used, 0 };
		while (json_each(&v, &none, &item))
			s.n += cat(plain(item), S("\n")).n;
		print(s);
	}
}

/* ------------------------------------------------ 57. Account commands -- */

/* directory (RFC 8555 7.1.1) */
static void
do_directory(char **arg)
{
	static const struct {
		char member[15], word[17];
	} urls[] = {
		{ "newAccount", "new-account" }, { "newOrder", "new-order" },
		{ "newAuthz", "new-authz" }, { "revokeCert", "revoke-cert" },
		{ "keyChange", "key-change" },
		{ "renewalInfo", "renewal-info" },
	}, pages[] = {
		{ "termsOfService", "terms-of-service" },
		{ "website", "website" },
	};
	Str meta, list, key, v;

	(void)arg;
	meta = json_member(directory(), "meta");
	list = json_member(meta, "profiles");
	while (json_each(&list, &key, &v))
		if (key.n && is_word(json_text(key)))
			add_other(text("profile % %", json_text(key),
			    is_line(plain(v)) ? plain(v) : NONE));
	for (size_t i = 0; i < COUNT(urls); i++)
		if ((v = endpoint(urls[i].member)).n)
			add_other(text("% %", str(urls[i].word), v));
	for (size_t i = 0; i < COUNT(pages); i++)
		if (is_word(v = text_of(meta, pages[i].member)))
			add_other(text("% %", str(pages[i].word), v));
	list = list_of(meta, "caaIdentities");
	while (json_each(&list, &key, &v))
		if (is_word(plain(v)))
			add_other(text("caa-identity %", plain(v)));
	v = json_member(meta, "externalAccountRequired");
	add_other(json_kind(v) == 't' ? S("external-account-required yes") :
	    S("external-account-required no"));
	print_record();
}

/*
 * The values of -m as a JSON array; NONE without -m. Empty values are left
 * out.
 */
static Str
contacts(void)
{
	Str s = NONE;

	for (size_t i = 0; i < ncontact; i++)
		if (*contact[i])
			s = cat(NONE, s, s.n ? S(",") : NONE,
			    quote(str(contact[i])));
	return ncontact ? text("[%]", s) : NONE;
}

/* For external account binding; both are NONE without it. */
static struct {
	Str kid, mac_key;
} binding;

/* Read the identifier and the key of -e or of the variables. */
static void
check_new_account(char **arg)
{
	Str kid = variable("ACME_EAB_KID"), rest;
	Str mac_key = variable("ACME_EAB_HMAC_KEY");
	const char *file = opt['e'];

	(void)arg;
	if (file) {
		rest = read_file(file);
		warn_if_shared(file);
		kid = take_word(&rest);
		mac_key = take_word(&rest);
		if (!mac_key.n || take_word(&rest).n)
			die(BAD, "% must hold two words, the KID and the "
			    "HMAC key", file_name(file));
	}
	if (!kid.n && !mac_key.n)
		return;
	binding.kid = kid;
	binding.mac_key = unb64_any(mac_key);
	if (!kid.n || !binding.mac_key.n)
		die(BAD, "external account binding: %", kid.n ?
		    S("the HMAC key is missing or is not base64") :
		    S("ACME_EAB_HMAC_KEY is set, but ACME_EAB_KID is not"));
}

/*
 * The external account binding (RFC 8555 7.3.4): the public account key,
 * signed with a secret from the CA; NONE if there is none.
 */
static Str
account_binding(void)
{
	Str input;

	if (!binding.kid.n)
		return NONE;
	input = jws_input(text("{\"alg\":\"HS256\",\"kid\":%,\"url\":%}",
	    quote(binding.kid), quote(need_endpoint("newAccount"))),
	    jwk(signer()));
	return jws(input, hmac_sha256(binding.mac_key, input));
}

/* With -v: report which contacts of -m the account lacks. */
static void
say_dropped(Str list)
{
	Str all, none, v;

	for (size_t i = 0; verbose && i < ncontact; i++) {
		bool there = !*contact[i];

		for (all = list; json_each(&all, &none, &v); )
			there |= same_nocase(plain(v), str(contact[i]));
		if (!there)
			warn("the CA does not list the contact % for the "
			    "account", str(contact[i]));
	}
}

/*
 * Store an account object in the record (RFC 8555 7.1.2). A contact that
 * cannot be on a line, such as "mailto: x@y" of an old account, is left out.
 */
static void
account_store(const struct response *r)
{
	Str o = json_body(r), list, none, v;

	if ((v = member(r, o, "status", '"')).n)
		put("account-status", v, r->url);
	list = member(r, o, "contact", '[');
	say_dropped(list);
	while (json_each(&list, &none, &v))
		if (json_kind(v) == '"' && is_word(json_text(v)))
			put("contact", json_text(v), r->url);
		else
			warn("warning: a contact that cannot be a line of a "
			    "record is left out: %", brief(plain(v)));
}

/* new-account [-y] [-m CONTACT]... [-e EABFILE] (RFC 8555 7.3) */
static void
do_new_account(char **arg)
{
	Str o = with(NONE, "termsOfServiceAgreed", opt['y'] ? S("true") :
	    NONE);
	struct response r;

	(void)arg;
	o = with(o, "contact", contacts());
	o = with(o, "externalAccountBinding", account_binding());
	r = ask_account(signer(), braces(o));
	/* No HMAC key is base64 by chance; some tools encode it twice. */
	if (r.status >= 400 && unb64_any(binding.mac_key).n)
		remedy = S("; the HMAC key was base64 of text that is "
		    "base64, too: try that text");
	take_account(&r);
	account_store(&r);
	print_record();
}

/* Add a page of orders to `all`, on top of the heap. */
static Str
add_orders(Str all, const struct response *r)
{
	Str v, list, none, lines;

	if (!json_read(r->body, &v))
		broken(r, "is not JSON");
	list = json_kind(v) == '[' ? v : member(r, json_body(r), "orders", '[');
	for (lines = cat(NONE, all); json_each(&list, &none, &v); ) {
		v = absolute(r->url, json_kind(v) == '"' ? json_text(v) :
		    NONE);
		if (!is_url(v))
			broken(r, "has an order that is not a URL");
		lines = cat(lines, S("account-order "), v, S("\n"));
	}
	return lines;
}

/*
 * The orders of an account as lines, if the CA lists them (RFC 8555 7.1.2.1),
 * page by page.
 */
static Str
list_orders(const struct response *account)
{
	Str all = NONE, next = member(account, json_body(account), "orders",
	    '"');
	size_t mark = used;
	struct post p = { .payload = NONE };
	struct links links;
	struct response r;

	next = absolute(account->url, next);
	if (next.n && !is_url(next))
		broken(account, "has no https URL for orders: %",
		    brief(next));
	for (int page = 1; next.n; page++) {
		if (page > PAGES)
			die(FAULT, "the list of orders has more than % pages",
			    num(PAGES));
		p.url = next;
		acme_batch(&p, &r, 1);
		if (r.status >= 300) {
			warn("warning: cannot read the account's orders: %",
			    problem(&r));
			return all;
		}
		all = add_orders(all, &r);
		links = begin_links(&r);
		next = next_link(&links, S("next"));
		if (same(next, r.url))
			broken(&r, "names itself as its next page");
		/* Keep both, as one string, and free what the page took. */
		next.p = keep(mark, cat(NONE, all, next)).p + all.n;
		all.p = next.p - all.n;
	}
	return all;
}

/* account [-m CONTACT]... [-D] (RFC 8555 7.3.1, 7.3.2, 7.3.6) */
static void
do_account(char **arg)
{
	struct response r = find_account(signer());
	Str change = with(NONE, "contact", contacts()), orders = NONE;

	(void)arg;
	take_account(&r);
	change = with(change, "status", opt['D'] ? S("\"deactivated\"") :
	    NONE);
	if (change.n) {
		refuse_redirected();
		r = acme_post(order.account, braces(change));
	}
	account_store(&r);
	if (!opt['D'])
		orders = list_orders(&r);
	print_record_and(orders);
}

/*
 * Is the new key the account's now? Only asking the CA shows it: if the
 * response was lost the change looks refused, and some CAs agree to a key
 * that another account has but change nothing.
 */
static bool
key_changed(void)
{
	struct response r = find_account(&other_key);

	if (r.status == 429 || r.status >= 500)
		accept_response(&r);
	if (r.status >= 300 || (order.account.n &&
	    !same(location(&r), order.account)))
		return false;
	take_account(&r);
	return true;
}

/* The part of a key change that the new key signs (RFC 8555 7.3.5). */
static Str
change_text(Str url)
{
	const struct key *k = &other_key;
	Str input = jws_input(
	    text("{\"alg\":\"%\",\"jwk\":%,\"url\":%}",
	        str(k->type->alg), jwk(k), quote(url)),
	    text("{\"account\":%,\"oldKey\":%}",
	        quote(order.account), jwk(signer())));

	return jws(input, sign(k, input, false));
}

static void
check_key_change(char **arg)
{
	(void)arg;
	if (is_std(opt['K']))
		usage("the new key cannot come from standard input; use "
		    "-K FILE");
	key_read(&other_key, opt['K']);
	if (same(public_key(&other_key), public_key(signer())))
		die(BAD, "% is the same key as %", str(opt['K']),
		    str(account_file));
}

/*
 * With some CAs it takes seconds until all servers know a new key. Wait for
 * that, at most LAG seconds, so that the next step can use it.
 */
static void
await_new_key(void)
{
	struct post p = { .url = order.account, .payload = NONE,
	    .key = &other_key };
	struct response r;
	Str o;

	if (boxed)
		return;
	for (int i = 0; i < LAG; i++) {
		acme_batch(&p, &r, 1);
		if (r.status < 400 || !json_read(r.body, &o) ||
		    !is_about_key(text_of(o, "type"), text_of(o, "detail")))
			return;
		if (!pause_for("waiting for the CA to accept the new key",
		    1000))
			break;
	}
	warn("the CA does not accept the new key yet; wait before the next "
	    "step");
}

/*
 * key-change -K NEWKEY (RFC 8555 7.3.5). One of the two files always has the
 * account key, and the message says which, or to run the command again.
 */
static void
do_key_change(char **arg)
{
	struct post p = { .url = need_endpoint("keyChange") };
	struct response r;

	(void)arg;
	refuse_redirected();
	remedy = S("; run it again to learn which is the account key");
	if (!order.account.n) {
		r = find_account(signer());
		if (r.status < 300)
			take_account(&r);
	}
	if (order.account.n) {
		p.payload = change_text(p.url);
		acme_batch(&p, &r, 1);
	}
	if (!key_changed()) {
		remedy = text("; the account key is still %",
		    str(account_file));
		accept_response(&r);
		die(BROKEN, "the CA agreed to the key change, but does not "
		    "accept the new key");
	}
	remedy = text("; the account's key is now %", str(opt['K']));
	await_new_key();
	remedy = NONE;
	print_record();
	warn("the account key is now %, no longer %", str(opt['K']),
	    str(account_file));
}

/* -------------------------------------------------- 58. Order commands -- */

/* An identifier as JSON (RFC 8555 9.7.7). */
static Str
identifier_json(const struct identifier *id)
{
	return text("{\"type\":%,\"value\":%}", quote(id->type),
	    quote(id->value));
}

/* The identifiers of a new order (RFC 8555 7.4). */
static Str
identifiers_json(void)
{
	struct list all = text_begin();
	const struct identifier *id;

	for each(id, identifier)
		list_add(&all, ",", identifier_json(id));
	return text("[%]", list_text(&all));
}

/* new-authz NAME (RFC 8555 7.4.1) */
static void
do_new_authz(char **arg)
{
	struct response r;

	(void)arg;
	r = acme_post(need_endpoint("newAuthz"), text("{\"identifier\":%}",
	    identifier_json(&order.identifier[0])));
	put("authorization", location(&r), r.url);
	print_record();
}

/*
 * deactivate-authz (RFC 8555 7.5.2). An account has a status, too, and the
 * same payload would deactivate it (7.3.6): so the object must have what only
 * an authorization has.
 */
static void
do_deactivate_authz(char **arg)
{
	static struct post p[NAMES];
	static struct response r[NAMES];
	const struct authorization *a;
	size_t n = 0;

	(void)arg;
	if (!order.nauthorization)
		need("order");
	need("identifier");
	if (!order.nauthorization)
		order_refresh();
	refuse_redirected();
	fetch_authorizations(false);
	for each(a, authorization) {
		if (!is_usable(a))
			continue;
		if (!a->challenge)
			broken(a, "lacks the member %", S("challenges"));
		p[n++] = (struct post){ .url = a->url,
		    .payload = S("{\"status\":\"deactivated\"}") };
	}
	acme_batch(p, r, n);
	for (size_t i = 0; i < n; i++)
		accept_response(&r[i]);
	order.nauthorization = 0;
	print_record();
}

/* The time of -b or -u (RFC 8555 7.4), or NONE. */
static Str
time_option(int letter)
{
	Str s = str(opt[letter]);
	unsigned char c = (unsigned char)letter;
	long long t;

	if (opt[letter] && !rfc3339(s, &t))
		usage("-% needs a time such as 2026-11-24T12:00:00Z, not %",
		    (Str){ &c, 1 }, s);
	return opt[letter] ? quote(s) : NONE;
}

/* The profile of -p, which the CA must have, or NONE. */
static Str
profile_option(void)
{
	Str list = json_member(json_member(directory(), "meta"), "profiles");
	struct list all = list_begin();
	Str name, value;

	if (!opt['p'])
		return NONE;
	if (json_kind(list) != '{')
		list = NONE;
	while (json_each(&list, &name, &value)) {
		if (same(json_text(name), str(opt['p'])))
			return quote(str(opt['p']));
		list_add(&all, " ", brief(json_text(name)));
	}
	die(REFUSED, all.n ? "the CA has no profile '%', only: %" :
	    "the CA has no profile '%', nor any other", str(opt['p']),
	    list_text(&all));
}

/*
 * The identifier of RFC 9773 4.1; NONE if the certificate has no authority
 * key identifier.
 */
static Str
certificate_id(const struct cert *c)
{
	return c->key_id.n ? text("%.%", b64(c->key_id),
	    b64(c->serial)) : NONE;
}

/* The certificate of -R, renewal-info and revoke-cert. */
static struct cert subject;

/*
 * -R: the certificate that the order replaces, if the CA offers renewal
 * information; or NONE.
 */
static Str
replaces_option(void)
{
	Str id;

	if (!opt['R'])
		return NONE;
	id = certificate_id(&subject);
	if (verbose && !id.n)
		warn("% has no authority key identifier: the order replaces "
		    "nothing", str(opt['R']));
	return id.n && endpoint("renewalInfo").n ? id : NONE;
}

/*
 * Can the CA have refused the order because of `replaces` (RFC 9773 5)? It
 * answers unauthorized if another account has the certificate.
 */
static bool
replaced_before(const struct response *r)
{
	return r->status == 409 || has_type(r, "alreadyReplaced") ||
	    has_type(r, "conflict") || has_type(r, "malformed") ||
	    has_type(r, "unauthorized") || has_type(r, "serverInternal");
}

/* Order the names of a CSR (-r): all, and no others. */
static void
take_csr_names(const char *file)
{
	struct cert csr;
	struct identifier name;
	Str list;

	read_csr(file, &csr);
	for (list = csr.alt_names; cert_name(&list, &name); ) {
		if (!is_name(name.type, name.value))
			die(BAD, "% asks for what is neither a DNS name nor an "
			    "IP address: %", file_name(file),
			    brief(name.value));
		add_name(&name);
	}
	if (!order.nidentifier)
		die(BAD, "% has no names", file_name(file));
}

static void
check_new_order(char **arg)
{
	if (opt['r'])
		take_csr_names(opt['r']);
	take_names(arg);
	time_option('b');
	time_option('u');
	if (opt['R'])
		read_certificate(opt['R'], &subject);
}

/*
 * new-order [-r CSR] [-p PROFILE] [-R CERT] [-b TIME] [-u TIME] NAME...
 * (RFC 8555 7.4, RFC 9773 5)
 */
static void
do_new_order(char **arg)
{
	Str o, replaces = replaces_option();
	struct post p = { .url = need_endpoint("newOrder") };
	struct response r;

	(void)arg;
	o = with(NONE, "identifiers", identifiers_json());
	o = with(o, "notBefore", time_option('b'));
	o = with(o, "notAfter", time_option('u'));
	o = with(o, "profile", profile_option());
	p.payload = braces(with(o, "replaces", replaces.n ? quote(replaces) :
	    NONE));
	acme_batch(&p, &r, 1);
	if (replaces.n && replaced_before(&r)) {
		if (verbose)
			warn("refused, retrying without replaces: %",
			    problem(&r));
		p.payload = braces(o);
		acme_batch(&p, &r, 1);
	}
	accept_response(&r);
	put("order", location(&r), r.url);
	order_store(&r);
	if (order.status == INVALID)
		order_failed();
	print_record();
}

/* order [-W] */
static void
do_order(char **arg)
{
	(void)arg;
	order_refresh();
	if (opt['W']) {
		order_await(PENDING | PROCESSING, "waiting for the order", 0);
		if (order.status == INVALID)
			order_failed();
	}
	print_record();
}

static Str
challenge_type_names(void)
{
	return NAMES_OF(challenge_types);
}

/* -t, which must be a known challenge type; NULL if not given. */
static const char *
type_option(void)
{
	if (opt['t'] && !find_challenge_type(str(opt['t'])))
		usage("no such challenge type: %; there are %", str(opt['t']),
		    challenge_type_names());
	return opt['t'];
}

/* challenges [-t TYPE] (RFC 8555 7.5) */
static void
do_challenges(char **arg)
{
	const char *type = type_option();

	(void)arg;
	if (order.status & (READY | VALID)) {
		print_record();
		return;
	}
	order.nchallenge = 0;
	fetch_authorizations(false);
	add_challenges(type);
	print_record();
}

/* The chosen row of publishers[]; NULL if the user publishes. */
static const struct publisher *
chosen_publisher(void)
{
	for (size_t i = 0; i < COUNT(publishers); i++)
		if (opt[publishers[i].letter])
			return &publishers[i];
	return NULL;
}

/* The seconds of -s. */
static unsigned long
settling_time(void)
{
	enum { SETTLE = 30 };	/* for the records of a zone to spread */
	unsigned long n = opt['c'] ? SETTLE : 0;

	if (opt['s'] && !number(str(opt['s']), MAX_WAIT, &n))
		usage("-s needs a number of seconds, not %", str(opt['s']));
	if (opt['s'] && n >= activity.limit)
		usage("-s must be less than -T");
	if (opt['c'] && n == 0)
		usage("-s must be at least 1 with -c");
	if (opt['c'] && boxed)
		usage("-c cannot be used with -B");
	return n;
}

/* Check the options of respond. */
static void
check_respond(char **arg)
{
	const char *type = type_option();
	const struct publisher *how = chosen_publisher();

	(void)arg;
	settling_time();
	if (!how)
		return;
	if (opt['n'])
		usage("-n cannot be used with -w, -l or -x: what they "
		    "publish would be removed at once");
	how->check(opt[how->letter], type);
}

/*
 * Find the challenges to answer: one for each name or, without -t, all, if a
 * hook may decline some. A name that is not pending has none, but what an
 * earlier run that was killed left for it is removed.
 */
static void
find_challenges(const struct publisher *how, const char *type)
{
	bool fetched = !order.nchallenge;
	bool pending = order.status == PENDING;

	if (fetched) {
		want_nonce = !boxed;
		fetch_authorizations(false);
		if (how && how->clean_names)
			how->clean_names(opt[how->letter]);
		add_challenges(type);
	}
	if (type || !hook_style || !hook_style->may_decline)
		choose_challenges(type);
	if (!order.nchallenge && order.url.n)
		order_refresh();
	if (!order.nchallenge && order.status == PENDING)
		die(REFUSED, "the CA offers no challenge of a supported type");
	if (fetched && pending && !order.nchallenge &&
	    order.status != INVALID && how && how->clean_ready)
		how->clean_ready(type);
}

/* The challenge type to answer: of -t, or the only possible one, or NULL. */
static const char *
respond_type(const struct publisher *how)
{
	return opt['t'] || !how || !how->type ? opt['t'] : how->type();
}

/*
 * respond [-t TYPE] [-w DIR | -l ADDR | -x HOOK] [-c] [-s SECONDS] [-n]
 * (RFC 8555 7.5.1)
 */
static void
do_respond(char **arg)
{
	unsigned long settle = settling_time();
	size_t before = ncleanup;
	long after;
	const struct publisher *how = chosen_publisher();
	const char *type = respond_type(how), *value = how ?
	    opt[how->letter] : NULL;

	(void)arg;
	if (order.status & (READY | VALID)) {
		if (how && how->clean_passed)
			how->clean_passed(value);
		print_record();
		return;
	}
	box.published = before;
	if (how && how->prepare)
		how->prepare(value, type);
	find_challenges(how, type);
	if (how)
		how->publish(value);
	if (opt['c'])
		await_published(settle);
	else if (settle && !pause_for("waiting after publishing (-s)",
	    (long long)settle * 1000))
		die(LATER, "too little of -T is left for -s; raise -T");
	validating = how != NULL;
	after = ask_to_validate(!opt['n'] && order.url.n);
	if (!opt['n'] && order.url.n)
		order_await(PENDING, "waiting for the CA to validate", after);
	else if (!opt['n'])
		authorizations_await("waiting for the CA to validate");
	validated = order.status != INVALID;
	validating = false;
	clean_up_to(before);
	if (!validated)
		order_failed();
	order.nchallenge = 0;
	print_record();
}

/* -------------------------------------------- 59. Certificate commands -- */

static struct cert wanted;	/* by finalize: the CSR of -r, the key of -K */

static void
check_finalize(char **arg)
{
	(void)arg;
	if (opt['K'])
		wanted.public_key = read_csr_key(opt['K']);
	else
		read_csr(opt['r'], &wanted);
}

/* End the step if the names of the CSR of -r are not those of the order. */
static void
check_csr_names(void)
{
	Str fault = NONE;

	if (opt['r'] && order.nidentifier)
		fault = names_differ(&wanted);
	if (fault.n)
		die(BAD, "the names of % differ from the order's: it %",
		    file_name(opt['r']), fault);
}

/* finalize (-K KEY | -r CSR) (RFC 8555 7.4) */
static void
do_finalize(char **arg)
{
	Str csr = wanted.der;
	bool sent = false;

	(void)arg;
	need("order");
	check_csr_names();
	if (opt['K'])
		csr = csr_der(&other_key, record_names(), NONE);
	if (!order.status)
		order_refresh();
	for (;;)
		switch (order.status) {
		case PENDING:
			order_refresh();
			order_await(PENDING, "waiting for the order to be "
			    "ready", 0);
			break;
		case READY:
			check_csr_names();
			if (sent)
				order_await(READY, "waiting for the "
				    "certificate", 0);
			else
				sent = send_request(csr);
			break;
		case PROCESSING:
			order_refresh();
			order_await(PROCESSING, "waiting for the certificate",
			    0);
			break;
		case INVALID:
			order_failed();
			break;
		default:
			if (!order.certificate.n)
				order_refresh();
			print_certificate(opt['i'], wanted.public_key, sent ?
			    BROKEN : BAD);
			return;
		}
}

/* certificate (RFC 8555 7.4.2) */
static void
do_certificate(char **arg)
{
	(void)arg;
	if (!order.certificate.n)
		order_refresh();
	if (order.status == INVALID)
		order_failed();
	if (order.status != VALID)
		die(LATER, "the order is %: it has no certificate yet",
		    status_text(&order.status));
	print_certificate(opt['i'], NONE, BROKEN);
}

/* RFC 5280 5.3.1 */
static const char reasons[][21] = {
	"unspecified", "keyCompromise", "cACompromise", "affiliationChanged",
	"superseded", "cessationOfOperation", "certificateHold", "-",
	"removeFromCRL", "privilegeWithdrawn", "aACompromise"
};

static Str
reason_code(const char *s)
{
	struct list all = list_begin();
	unsigned long n = 0;

	for (size_t i = 0; i < COUNT(reasons); i++)
		if (i != 7)	/* RFC 5280 5.3.1 has none */
			list_add(&all, " ", str(reasons[i]));
	while (n < COUNT(reasons) && strcmp(s, reasons[n]) != 0)
		n++;
	if ((n == COUNT(reasons) && !number(str(s), COUNT(reasons) - 1, &n)) ||
	    n == 7)
		usage("no such reason: %; there are %", str(s),
		    list_text(&all));
	return num(n);
}

static void
check_revoke_cert(char **arg)
{
	if (opt['c'])
		reason_code(opt['c']);
	read_certificate(arg[0], &subject);
	if (!opt['K'])
		return;
	key_read(&other_key, opt['K']);
	if (!same(public_key(&other_key), subject.public_key))
		die(BAD, "% is not the key of %", str(opt['K']),
		    file_name(arg[0]));
}

/* revoke-cert [-K CERTKEY] [-c REASON] CERT (RFC 8555 7.6) */
static void
do_revoke_cert(char **arg)
{
	Str reason = opt['c'] ? reason_code(opt['c']) : NONE;
	struct post p = { .url = need_endpoint("revokeCert"),
	    .jwk = opt['K'] != NULL };
	struct response r;

	(void)arg;
	if (opt['K'])
		p.key = &other_key;
	key_alone = p.jwk;
	p.payload = braces(with(with(NONE, "certificate",
	    quote(b64(subject.der))), "reason", reason));
	acme_batch(&p, &r, 1);
	if (has_type(&r, "alreadyRevoked"))
		warn("% is already revoked", file_name(arg[0]));
	else
		accept_response(&r);
}

/*
 * A moment in a window that is not empty, always the same one for the same
 * certificate and window (RFC 9773 4.2).
 */
static long long
window_moment(const struct cert *c, long long start, long long end)
{
	Str h = sha256(cat(NONE, c->der, date(start), date(end)));
	unsigned long long n = 0;

	for (int i = 0; i < 8; i++)
		n = n << 8 | h.p[i];
	return start + (long long)(n % (unsigned long long)(end - start));
}

static void
check_renewal_info(char **arg)
{
	read_certificate(arg[0], &subject);
	if (!subject.key_id.n)
		die(BAD, "% has no authority key identifier, so the CA cannot "
		    "be asked about it", file_name(arg[0]));
}

/* renewal-info CERT (RFC 9773 4) */
static void
do_renewal_info(char **arg)
{
	long long start, end, when;
	Str base = need_endpoint("renewalInfo"), o, window, lines;
	struct response r;

	(void)arg;
	lines = certificate_id(&subject);
	r = fetch(cat(NONE, base, base.p[base.n - 1] == '/' ? NONE : S("/"),
	    lines), false);
	accept_response(&r);
	o = json_body(&r);
	window = need_member(&r, o, "suggestedWindow", '{');
	if (!rfc3339(need_member(&r, window, "start", '"'), &start) ||
	    !rfc3339(need_member(&r, window, "end", '"'), &end))
		broken(&r, "has a suggestedWindow without valid times");
	if (end <= start)
		broken(&r, "has an empty suggestedWindow; use acme-step due "
		    "instead");
	when = window_moment(&subject, start, end);
	lines = text("window % %\nmoment %\n", date(start), date(end),
	    date(when));
	o = member(&r, o, "explanationURL", '"');
	if (is_word(o))
		lines = text("%explanation %\n", lines, o);
	if (r.retry_after >= 0)
		lines = text("%retry-after %\n", lines,
		    num((unsigned long)r.retry_after));
	print(lines);
	if (now_seconds() < when)
		answer_no();
}

/* ---------------------------------------------------- 60. Raw requests -- */

static void
check_url(char **arg)
{
	if (!is_url(str(arg[0])))
		usage("not an https URL: %", str(arg[0]));
}

/* Send a request of the user, and print the body of the response. */
static void
post_and_print(const char *url, Str payload, bool once)
{
	struct post p = { .url = str(url), .payload = payload, .once = once };
	struct response r;

	if (!is_own(p.url))
		usage("% is not a URL of the CA at %", p.url,
		    origin(ca_url()));
	acme_batch(&p, &r, 1);
	accept_response(&r);
	print(r.body);
}

/* get URL: POST-as-GET (RFC 8555 6.3) */
static void
do_get(char **arg)
{
	post_and_print(arg[0], NONE, false);
}

/* post URL: the JSON on standard input (RFC 8555 6.2) */
static void
do_post(char **arg)
{
	Str body = read_file(NULL), v;

	if (!json_read(body, &v))
		die(BAD, "standard input is not JSON");
	post_and_print(arg[0], v, true);
}

/* Read a file that box_request() made; false for any other. */
static bool
read_request_file(Str s, struct request *q)
{
	Str method, value, line_text;
	unsigned long length = 0;

	while (begins(s, "# "))
		cut(&s, '\n');
	method = cut(&s, ' ');
	q->method = is(method, "GET") ? "GET" : is(method, "HEAD") ?
	    "HEAD" : "POST";
	q->url = cut(&s, ' ');
	if (!same(method, str(q->method)) || !is_url(q->url))
		return false;
	cut(&s, '\n');
	while (s.n && !is(line_text = cut(&s, '\n'), "\r")) {
		value = line_text;
		if (same_nocase(cut(&value, ':'), S("Content-Length")) &&
		    !number(trim(cut(&value, '\r')), INPUT, &length))
			return false;
	}
	q->body = s;
	q->once = false;
	return s.n == length;
}

/* send BOX: send the requests that have no response yet, many at a time. */
static void
do_send(char **arg)
{
	static struct request q[WINDOW];
	static struct response r[WINDOW];
	unsigned long next = 1, at[WINDOW];
	Str request[WINDOW], s;
	size_t n, mark = used;

	open_box(arg[0], false);
	if (!box_read(box_file(1, "request"), &s))
		die(MISSING, "% is not a box: it has no 1.request",
		    str(arg[0]));
	do {
		for (n = 0; n < WINDOW && box_read(box_file(next, "request"),
		    &request[n]); next++) {
			if (box_read(box_file(next, "response"), &s))
				continue;
			if (!read_request_file(request[n], &q[n]))
				die(BAD, "% in % is not a request",
				    str(box_file(next, "request")),
				    str(arg[0]));
			at[n++] = next;
		}
		exchange(q, r, n);
		for (size_t i = 0; i < n; i++) {
			s = box_response(&r[i]);
			box_write(box_file(at[i], "response"), text("%"
			    BOX_CHECK "%\n", s, box_check(request[i], s)));
		}
		used = mark;
	} while (n == WINDOW);
}

static void do_help(char **);

/* What a macro is defined as; its name, if it is not defined. */
#define DEFINITION(macro)  AS_TEXT(macro)
#define AS_TEXT(words)     #words

/*
 * musl and BearSSL 0.6 do not tell their versions. Only glibc defines
 * __GLIBC__, and only later versions of BearSSL have a callback for the time.
 */
static void
do_version(char **arg)
{
	static const char libc[] = DEFINITION(__GLIBC__),
	    callback[] = DEFINITION(BR_FEATURE_X509_TIME_CALLBACK);

	(void)arg;
	print(text("acme-step " VERSION " (BearSSL %, %)\n",
	    str(*callback == 'B' ? "0.6" : "after 0.6"),
	    str(*libc == '_' ? "musl" : "glibc")));
}

/* ----------------------------------------------------------- 61. Table -- */

/*
 * An option of one command, or a common one. Parsing, usage errors,
 * synopses and help all come from its row.
 */
struct option {
	void (*add)(const char *value);	/* NULL if it cannot be repeated */
	const char *variable;	/* read if the option is not given */
	Str (*choices)(void);	/* what the value can be */
	short needs;		/* shared: commands with one of these; 0: all */
	char letter;
	bool required;		/* the command cannot do without it */
	bool or;		/* an alternative to the one before it */
	char arg[15];		/* the name of its value; "": it has none */
	char gist[51];		/* a gap is for the variable */
};

enum {			/* what a command needs before it is called */
	RECORD_IN = 1,	/* a record on standard input */
	RECORD_OUT = 2,	/* if it fails, a failed line in place of a record */
	KEY_OUT = 4,	/* a new file of mode 0600 as its output */
	NET = 8,	/* the CA */
	CARRY = 16,	/* the CA, for requests that other steps have made */
	KEY = 32,	/* the account key */
	ACCOUNT_RECORD = 64,	/* the account record, if -a names one */
	ACCOUNT_URL = 128,	/* from that record, or found by the key */
	ONLY_NET_WITH_K = 256,	/* with -K, no more of these than NET */
	SIGNED = NET | KEY | ACCOUNT_RECORD | ACCOUNT_URL,
	ORDER = RECORD_IN | SIGNED
};

enum { ISSUE, DETAILS, RENEWAL, ACCOUNT, OTHER };	/* groups of help */

static const char groups[][39] = {
	[ISSUE] = "Get a certificate",
	[DETAILS] = "Keys, orders and challenges in detail",
	[RENEWAL] = "Renew and revoke",
	[ACCOUNT] = "The account",
	[OTHER] = "Other"
};

#define OPTIONS(...) \
    .options = (const struct option[]){ __VA_ARGS__ }, \
    .noptions = COUNT(((const struct option[]){ __VA_ARGS__ }))

enum { ANY = SHRT_MAX };		/* as many arguments as there are */

static const struct command {
	char name[17], gist[44];
	char group, min;
	char or;			/* an option in place of arguments */
	short max, needs;		/* arguments: min to max */
	unsigned char noptions;
	const char *args;		/* after the options; NULL: none */
	const struct option *options;	/* its own */
	/* What must be right before a record is awaited or a request sent. */
	void (*check)(char **arg);
	void (*run)(char **arg);
} commands[] = {
{ .name = "key", .group = ISSUE, .needs = KEY_OUT,
	.gist = "make a private key", .run = do_key,
	OPTIONS(
	{ .letter = 't', .arg = "TYPE", .choices = key_type_names,
	    .gist = "type (ec256)" },
	{ .letter = 'o', .arg = "FILE", .required = true,
	    .gist = "the new file for the key" }) },
{ .name = "csr", .group = DETAILS, .args = "NAME...", .min = 1, .max = ANY,
	.gist = "make a certificate request",
	.check = check_csr, .run = do_csr,
	OPTIONS(
	{ .letter = 'K', .arg = "KEY", .required = true,
	    .gist = "the certificate's private key" },
	{ .letter = 'N', .arg = "NAME",
	    .gist = "the common name of its subject (none)" }) },
{ .name = "thumbprint", .group = DETAILS, .needs = KEY,
	.gist = "print the account key's thumbprint", .run = do_thumbprint },
{ .name = "due", .group = RENEWAL,
	.args = "CERT [NAME...]", .min = 1, .max = ANY,
	.gist = "check whether it is time to renew", .run = do_due,
	OPTIONS(
	{ .letter = 'K', .arg = "KEY",
	    .gist = "also due if the certificate is not for this key" }) },
{ .name = "json", .group = OTHER,
	.args = "PATH [FILE]", .min = 1, .max = 2,
	.gist = "print a value from JSON", .run = do_json },
{ .name = "directory", .group = OTHER, .needs = RECORD_OUT | NET,
	.gist = "print what the CA offers", .run = do_directory },
{ .name = "new-account", .group = ISSUE, .needs = RECORD_OUT | NET | KEY,
	.gist = "create an account, or find it",
	.check = check_new_account, .run = do_new_account,
	OPTIONS(
	{ .letter = 'y', .gist = "agree to the CA's terms of service" },
	{ .letter = 'm', .arg = "CONTACT", .add = add_contact,
	    .gist = "a contact, such as mailto:you@example.com" },
	{ .letter = 'e', .arg = "EABFILE",
	    .variable = "ACME_EAB_KID, ACME_EAB_HMAC_KEY",
	    .gist = "KID and HMAC key (or %)" }) },
{ .name = "account", .group = ACCOUNT,
	.needs = RECORD_OUT | NET | KEY | ACCOUNT_RECORD,
	.gist = "show, update or deactivate the account", .run = do_account,
	OPTIONS(
	{ .letter = 'm', .arg = "CONTACT", .add = add_contact,
	    .gist = "a contact; those given replace all; '' for none" },
	{ .letter = 'D', .gist = "deactivate it; this cannot be undone" }) },
{ .name = "key-change", .group = ACCOUNT,
	.needs = RECORD_OUT | NET | KEY | ACCOUNT_RECORD,
	.gist = "give the account another key",
	.check = check_key_change, .run = do_key_change,
	OPTIONS(
	{ .letter = 'K', .arg = "NEWKEY", .required = true,
	    .gist = "the new account key, made with acme-step key" }) },
{ .name = "new-authz", .group = DETAILS, .needs = RECORD_OUT | SIGNED,
	.args = "NAME", .min = 1, .max = 1,
	.gist = "create an authorization without an order",
	.check = take_names, .run = do_new_authz },
{ .name = "new-order", .group = ISSUE, .needs = RECORD_OUT | SIGNED,
	.args = "NAME...", .min = 1, .max = ANY, .or = 'r',
	.gist = "order a certificate",
	.check = check_new_order, .run = do_new_order,
	OPTIONS(
	{ .letter = 'r', .arg = "CSR",
	    .gist = "a certificate request, in place of names" },
	{ .letter = 'p', .arg = "PROFILE",
	    .gist = "profile, as directory prints it (the CA's choice)" },
	{ .letter = 'R', .arg = "CERT",
	    .gist = "the certificate that this one replaces (none)" },
	{ .letter = 'b', .arg = "TIME",
	    .gist = "start, as in 2026-11-24T12:00:00Z (CA's choice)" },
	{ .letter = 'u', .arg = "TIME",
	    .gist = "end, in the same form (the CA's choice)" }) },
{ .name = "order", .group = DETAILS, .needs = RECORD_OUT | ORDER,
	.gist = "fetch the order, and optionally wait", .run = do_order,
	OPTIONS(
	{ .letter = 'W',
	    .gist = "wait until it is no longer pending or processing" }) },
{ .name = "challenges", .group = DETAILS, .needs = RECORD_OUT | ORDER,
	.gist = "add the challenges that are to be answered",
	.run = do_challenges,
	OPTIONS(
	{ .letter = 't', .arg = "TYPE", .choices = challenge_type_names,
	    .gist = "type (all of these)" }) },
{ .name = "respond", .group = ISSUE, .needs = RECORD_OUT | ORDER,
	.gist = "answer the challenges",
	.check = check_respond, .run = do_respond,
	OPTIONS(
	{ .letter = 't', .arg = "TYPE", .choices = challenge_type_names,
	    .gist = "challenge type, if a name has several" },
	{ .letter = 'w', .arg = "DIR",
	    .gist = "publish http-01 as files that a web server serves" },
	{ .letter = 'l', .arg = "ADDR", .or = true,
	    .gist = "answer on [proxy:][HOST:]PORT (80, 443, DNS 53)" },
	{ .letter = 'x', .arg = "HOOK", .or = true,
	    .choices = hook_style_names,
	    .gist = "publish with [STYLE:]PROGRAM (style dehydrated)" },
	{ .letter = 'c',
	    .gist = "look at all that is published before the CA does" },
	{ .letter = 's', .arg = "SECONDS",
	    .gist = "wait after publishing (0), or -c's limit (30)" },
	{ .letter = 'n', .gist = "do not wait for the CA to validate" }) },
{ .name = "finalize", .group = ISSUE, .needs = ORDER,
	.gist = "get the certificate",
	.check = check_finalize, .run = do_finalize,
	OPTIONS(
	{ .letter = 'K', .arg = "KEY", .required = true,
	    .gist = "the certificate's private key" },
	{ .letter = 'r', .arg = "CSR", .required = true, .or = true,
	    .gist = "a certificate request, PEM or DER" },
	{ .letter = 'i', .arg = "ISSUER",
	    .gist = "topmost issuer of the chain (the CA's choice)" }) },
{ .name = "certificate", .group = DETAILS, .needs = ORDER,
	.gist = "download the certificate again", .run = do_certificate,
	OPTIONS(
	{ .letter = 'i', .arg = "ISSUER",
	    .gist = "topmost issuer of the chain (the CA's choice)" }) },
{ .name = "renewal-info", .group = RENEWAL, .needs = NET | ACCOUNT_RECORD,
	.args = "CERT", .min = 1, .max = 1,
	.gist = "ask the CA when to renew",
	.check = check_renewal_info, .run = do_renewal_info },
{ .name = "revoke-cert", .group = RENEWAL, .needs = SIGNED | ONLY_NET_WITH_K,
	.args = "CERT", .min = 1, .max = 1,
	.gist = "revoke a certificate",
	.check = check_revoke_cert, .run = do_revoke_cert,
	OPTIONS(
	{ .letter = 'K', .arg = "CERTKEY",
	    .gist = "sign with its private key (the account key)" },
	{ .letter = 'c', .arg = "REASON",
	    .gist = "such as keyCompromise, or a number (none)" }) },
{ .name = "deactivate-authz", .group = DETAILS, .needs = RECORD_OUT | ORDER,
	.gist = "deactivate the authorizations", .run = do_deactivate_authz },
{ .name = "get", .group = OTHER, .needs = SIGNED,
	.args = "URL", .min = 1, .max = 1,
	.gist = "read a resource of the CA",
	.check = check_url, .run = do_get },
{ .name = "post", .group = OTHER, .needs = SIGNED,
	.args = "URL", .min = 1, .max = 1,
	.gist = "send JSON to a resource of the CA",
	.check = check_url, .run = do_post },
{ .name = "send", .group = OTHER, .needs = CARRY,
	.args = "BOX", .min = 1, .max = 1,
	.gist = "carry the requests of an air-gapped step", .run = do_send },
{ .name = "help", .group = OTHER, .args = "[COMMAND]", .max = 1,
	.gist = "print usage", .run = do_help },
{ .name = "version", .group = OTHER,
	.gist = "print the version", .run = do_version },
};

static const struct option shared[] = {
	{ .letter = 'd', .arg = "URL", .needs = NET,
	    .variable = "ACME_DIRECTORY",
	    .gist = "the CA's directory (Let's Encrypt; variable %)" },
	{ .letter = 'k', .arg = "FILE", .needs = KEY,
	    .variable = "ACME_KEY",
	    .gist = "the account key (account.pem; variable %)" },
	{ .letter = 'a', .arg = "FILE", .needs = NET,
	    .variable = "ACME_ACCOUNT",
	    .gist = "the account record (variable %)" },
	{ .letter = 'C', .arg = "FILE", .needs = NET | CARRY,
	    .variable = "ACME_CA_FILE",
	    .gist = "trust anchors (the system's; variable %)" },
	{ .letter = 'o', .arg = "FILE",
	    .gist = "output (standard output)" },
	{ .letter = 'T', .arg = "SECONDS",
	    .variable = "ACME_TIMEOUT",
	    .gist = "the step's time limit (300; variable %)" },
	{ .letter = 'H', .arg = "HOST:PORT:ADDR", .needs = NET | CARRY,
	    .add = add_resolve, .variable = "ACME_RESOLVE",
	    .gist = "connect to ADDR for HOST:PORT (variable %)" },
	{ .letter = 'P', .arg = "COMMAND", .needs = NET | CARRY,
	    .variable = "ACME_PROXY_COMMAND",
	    .gist = "connect through a command (variable %)" },
	{ .letter = 'B', .arg = "DIR", .needs = NET,
	    .variable = "ACME_BOX",
	    .gist = "air gap: write requests to files (variable %)" },
	{ .letter = '4', .needs = NET | CARRY,
	    .gist = "connect over IPv4 only" },
	{ .letter = '6', .or = true, .needs = NET | CARRY,
	    .gist = "connect over IPv6 only" },
	{ .letter = 'v', .needs = NET | CARRY,
	    .gist = "print a line for each request" },
};

#define LETS_ENCRYPT "https://acme-v02.api.letsencrypt.org/directory"

static const struct command *
find_command(const char *name)
{
	for (size_t i = 0; i < COUNT(commands); i++)
		if (strcmp(name, commands[i].name) == 0)
			return &commands[i];
	if (begins(str(name), "--"))
		usage("no such option: %", str(name));
	if (name[0] == '-')
		usage("% comes before the command; options go after it",
		    str(name));
	usage("no such command: %", str(name));
	return NULL;
}

/* "help" or "version" for what people try first; else s itself. */
static const char *
usual_name(const char *s)
{
	return strcmp(s, "-h") == 0 || strcmp(s, "--help") == 0 ? "help" :
	    strcmp(s, "--version") == 0 ? "version" : s;
}

/* An option of a command; NULL if it has none with that letter. */
static const struct option *
find_option(const struct command *c, int letter)
{
	for (size_t i = 0; i < c->noptions; i++)
		if (c->options[i].letter == letter)
			return &c->options[i];
	for (size_t i = 0; i < COUNT(shared); i++)
		if (shared[i].letter == letter)
			return &shared[i];
	return NULL;
}

/* The number of rows, of n, that are o and the alternatives to it. */
static size_t
alternatives(const struct option *o, size_t n)
{
	size_t i = 1;

	while (i < n && o[i].or)
		i++;
	return i;
}

/* "-o FILE", or "-v" */
static Str
option_text(const struct option *o)
{
	return cat(S("-"), (Str){ (const unsigned char *)&o->letter, 1 },
	    *o->arg ? S(" ") : NONE, str(o->arg));
}

/* A list of n options, with `last` before the last one. */
static Str
option_list(const struct option *o, size_t n, const char *separator,
    const char *last)
{
	struct list all = text_begin();

	for (size_t i = 0; i < n; i++)
		list_add(&all, i + 1 < n ? separator : last,
		    option_text(&o[i]));
	return list_text(&all);
}

/* For example "acme-step key [-t TYPE] -o FILE". */
static Str
synopsis(const struct command *c)
{
	struct list all = text_begin();

	list_add(&all, "", text("acme-step %", str(c->name)));
	for (size_t i = 0, n; i < c->noptions; i += n) {
		const struct option *o = &c->options[i];
		Str s;

		n = alternatives(o, c->noptions - i);
		s = option_list(o, n, " | ", " | ");
		if (!o->required)
			s = text("[%]", s);
		else if (n > 1)
			s = text("(%)", s);
		list_add(&all, " ", o->add ? text("%...", s) : s);
	}
	if (c->args)
		list_add(&all, " ", str(c->args));
	return list_text(&all);
}

/* A line of two columns. */
static Str
help_line(Str left, Str right)
{
	left = cat(NONE, left, from(S("                  "), left.n));
	return text("  % %\n", left, right);
}

static Str
option_help(const struct option *o)
{
	Str row = help_line(option_text(o), text(o->gist,
	    str(o->variable)));

	return o->choices ? cat(row, help_line(NONE, o->choices())) : row;
}

/*
 * Does an option affect a command? A command accepts all common ones,
 * but a row of its own hides the common one with the same letter.
 */
static bool
has_effect(const struct command *c, const struct option *o)
{
	return (!o->needs || c->needs & o->needs) &&
	    find_option(c, o->letter) == o;
}

static void
add_options(struct list *all, const struct command *c,
    const struct option *o, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (has_effect(c, &o[i]))
			list_add(all, "", option_help(&o[i]));
}

static Str
command_help(const struct command *c)
{
	struct list all = text_begin();

	list_add(&all, "", cat(NONE, synopsis(c), S("\n\n"), str(c->gist),
	    S("\n"), c->needs & RECORD_IN ? S("reads the record of an "
	    "earlier step from standard input\n") : NONE,
	    c->noptions ? S("\noptions:\n") : NONE));
	add_options(&all, c, c->options, c->noptions);
	list_add(&all, "", S("\ncommon options:\n"));
	add_options(&all, c, shared, COUNT(shared));
	return list_text(&all);
}

#define USE "usage: acme-step COMMAND [OPTION...] [ARGUMENT...]\n"

/* How to get a first certificate, without a web server. */
#define EXAMPLE \
    "A certificate from Let's Encrypt (add -d URL for the directory of " \
    "another CA);\nport 80 must be free:\n" \
    "  acme-step key -o account.pem\n" \
    "  acme-step key -o example.pem\n" \
    "  acme-step new-account -y -m mailto:ops@example.com -o account\n" \
    "  acme-step new-order -a account example.com |\n" \
    "  acme-step respond -t http-01 -l 80 |\n" \
    "  acme-step finalize -K example.pem -o fullchain.pem\n"

/* The exit statuses in short; README says what a script does next. */
#define STATUSES \
    "Exit status: 0 done, 1 no, 64 wrong usage, 65 bad input, 66 input\n" \
    "file missing, 69 CA not reachable, 70 limit or fault of acme-step,\n" \
    "73 cannot create or publish, 74 input/output error, 75 try later,\n" \
    "76 bad response from the CA, 77 refused by the CA, 78 CA not trusted\n"

static Str
overview(void)
{
	struct list all = text_begin();

	list_add(&all, "", S(USE
	    "\"acme-step help COMMAND\" explains it and its options\n\n"));
	for (int group = 0; group < (int)COUNT(groups); group++) {
		list_add(&all, "", text("%:\n", str(groups[group])));
		for (size_t i = 0; i < COUNT(commands); i++)
			if (commands[i].group == group)
				list_add(&all, "", help_line(
				    str(commands[i].name),
				    str(commands[i].gist)));
	}
	list_add(&all, "", S("\n" STATUSES "\n" EXAMPLE));
	return list_text(&all);
}

/* help [COMMAND] */
static void
do_help(char **arg)
{
	step = NONE;		/* a wrong name then refers to plain help */
	print(arg[0] ? command_help(find_command(arg[0])) : overview());
}

/* A short usage, with the commands that most users need. */
static void
no_command(void)
{
	struct list all = text_begin();

	for (size_t i = 0; i < COUNT(commands); i++)
		if (commands[i].group == ISSUE)
			list_add(&all, ", ", str(commands[i].name));
	finish(USAGE);		/* for its time limit: this write can block */
	write_all(2, text(USE "commands for a certificate: %\n",
	    list_text(&all)));
	usage("no command given");
}

/* ------------------------------------------------------------ 62. Main -- */

/* Occupy descriptors 0 to 2, so that no file of ours gets such a number. */
static void
hold_descriptors(void)
{
	int fd;

	do
		fd = open("/", O_RDONLY);
	while (fd >= 0 && fd < 3);
	if (fd >= 0)
		close(fd);
}

/*
 * Make the constants that were relocated at the start read-only
 * (GNU_RELRO). A dynamic loader does this, but musl's start code for a
 * static program does not. The program headers follow the ELF header, which
 * is at the start of the first segment. If the kernel refuses, only this
 * protection is missing.
 */
static void
protect_relocated(void)
{
	uintptr_t page = (uintptr_t)getpagesize();
	uintptr_t table = (uintptr_t)getauxval(AT_PHDR);
	uintptr_t base = table - sizeof(ElfW(Ehdr)), start, end;
	const ElfW(Phdr) *h = (const void *)table;

	for (unsigned long n = getauxval(AT_PHNUM); n > 0; n--, h++) {
		if (h->p_type == PT_LOAD && h->p_offset == 0)
			base -= h->p_vaddr;
		if (h->p_type != PT_GNU_RELRO)
			continue;
		start = base + h->p_vaddr;
		end = (start + h->p_memsz) / page * page;
		start = start / page * page;
		mprotect((void *)start, end - start, PROT_READ);
	}
}

/* An option's value; without it its variable's, or NULL if that is empty. */
static const char *
option(int letter)
{
	Str value = NONE;

	if (opt[letter])
		return opt[letter];
	for (size_t i = 0; i < COUNT(shared); i++)
		if (shared[i].letter == letter && shared[i].variable)
			value = variable(shared[i].variable);
	return value.n ? c_str(value) : NULL;
}

/* -h and --help print a command's help; another option is an error. */
static void
other_option(const struct command *c, const char *arg, Str letter)
{
	if (is(letter, "h") || strcmp(arg, "--help") == 0) {
		print(command_help(c));
		leave(DONE);
	}
	if (arg[1] == '-')
		usage("no such option: %; options have one letter", str(arg));
	usage("no such option: -%", letter);
}

/*
 * Read the options, up to "--" or the first argument (POSIX XBD 12.2), and
 * return the arguments.  getopt() would bring in all of stdio.
 */
static char **
read_options(const struct command *c, char **arg)
{
	for (; *arg && (*arg)[0] == '-' && (*arg)[1]; arg++) {
		if (strcmp(*arg, "--") == 0)
			return arg + 1;
		for (const char *s = *arg + 1; *s; s++) {
			Str letter = { (const unsigned char *)s, 1 };
			const struct option *o = find_option(c, *s);

			if (!o)
				other_option(c, *arg, letter);
			opt[(int)*s] = "";
			if (!*o->arg)
				continue;
			opt[(int)*s] = s[1] ? s + 1 : *++arg;
			if (!*arg)
				usage("option -% needs a value", letter);
			if (o->add)
				o->add(opt[(int)o->letter]);
			break;
		}
	}
	return arg;
}

/* End the step if too few or too many of n alternatives were given. */
static void
check_given(const struct option *o, size_t n)
{
	const char *fault = "% cannot be combined";
	size_t given = 0;

	for (size_t i = 0; i < n; i++)
		given += opt[(int)o[i].letter] != NULL;
	if (o->required)
		fault = n > 1 ? "exactly one of % is required" :
		    "option % is required";
	if (given > 1 || (o->required && !given))
		usage(fault, option_list(o, n, ", ", " and "));
}

static void
check_all_given(const struct option *o, size_t count)
{
	for (size_t i = 0, n; i < count; i += n) {
		n = alternatives(&o[i], count - i);
		check_given(&o[i], n);
	}
}

/* End the step if the options or arguments are not those of the row. */
static void
check_usage(const struct command *c, char **arg)
{
	bool none = c->or && opt[(int)c->or];
	int n = 0;

	check_all_given(c->options, c->noptions);
	check_all_given(shared, COUNT(shared));
	while (arg[n])
		n++;
	if (n < c->min && !none)
		usage("too few arguments");
	if (n > (none ? 0 : c->max))
		usage("too many arguments");
}

/* The CA's directory: the record's, that of -d, or Let's Encrypt's. */
static void
choose_directory(void)
{
	const char *url = option('d');

	if (url && order.directory.n && !same(order.directory, str(url)))
		die(BAD, "the record is for the CA %, but -d or ACME_DIRECTORY "
		    "names %; at another CA start with new-account",
		    order.directory, str(url));
	if (!order.directory.n)
		order.directory = url ? str(url) : S(LETS_ENCRYPT);
}

/* Values of -H with white space between them (ACME_RESOLVE). */
static void
add_all_resolved(Str s)
{
	Str value;

	while ((value = take_word(&s)).n)
		add_resolved(value);
}

/*
 * Read the `origin` lines of an account record, for a command that uses no
 * other line of it. The file need not exist: new-account may create it.
 */
static void
read_origins(const char *file)
{
	Str s, value;

	if (is_missing(file))
		return;
	s = read_file(file);
	for (size_t n = 1; s.n; n++) {
		value = cut(&s, '\n');
		if (!is(cut(&value, ' '), "origin"))
			continue;
		if (!is_url(value))
			die(BAD, "%, line %: malformed 'origin' value",
			    file_name(file), num(n));
		set_value(keyword(S("origin")), value);
	}
}

/* Check and apply the common options. */
static void
apply_options(void)
{
	const char *limit = option('T'), *url = option('d');
	unsigned long n = activity.limit;

	if (limit && (!number(str(limit), MAX_WAIT, &n) || n == 0))
		usage("-T accepts 1 to 2592000 seconds, not %", str(limit));
	activity.limit = (unsigned)n;
	verbose = opt['v'];
	if (opt['4'])
		family = AF_INET;
	if (opt['6'])
		family = AF_INET6;
	if (url && !is_url(str(url)))
		usage("not an https URL: %", str(url));
	account_file = option('k') ? option('k') : "account.pem";
	account_record = option('a');
	proxy_command = option('P');
	if (!nresolved)
		add_all_resolved(str(option('H')));
}

/*
 * Open the output: a file before anything is read, a device or a pipe,
 * which can block, when the records have been read (`late`).
 */
static void
open_output(const struct command *c, bool late)
{
	const char *file = opt['o'];
	struct stat st;
	bool special = !is_std(file) && stat(file, &st) == 0 &&
	    !S_ISREG(st.st_mode);

	if (c->needs & KEY_OUT && is_std(file))
		usage("keys are not written to standard output; use -o FILE");
	if (!is_std(file) && special == late)
		out_open(file, c->needs & KEY_OUT);
	else if (special)
		out.fd = -1;
}

/*
 * Check all that is local first, so that a mistake is reported at once: in a
 * pipe it can take minutes until the record is there.
 */
static void
check_local(const struct command *c, int needs, char **arg)
{
	if (needs & KEY)
		signer();
	if (c->check)
		c->check(arg);
	boxed = needs & NET && option('B');
	if (!boxed && needs & (NET | CARRY))
		find_anchors(option('C'));
	open_output(c, false);
}

/* Read the records. Standard input has no time limit: its writer has one. */
static void
read_records(int needs)
{
	const char *file = account_record;
	bool first = needs & ACCOUNT_RECORD && file && !is_std(file);
	Str account = NONE;

	if (needs & ACCOUNT_RECORD && file && is_missing(file))
		remedy = text("; make one with acme-step new-account -o %",
		    file_name(file));
	if (first)
		account = read_file(file);
	remedy = NONE;
	alarm(0);
	if (needs & RECORD_IN && isatty(0))
		warn("reading a record from the terminal");
	if (needs & RECORD_IN)
		record_read(read_file_and(NULL, needs & NET ? look_early :
		    look_away), NULL, false);
	if (needs & ACCOUNT_RECORD && file)
		record_read(first ? account : read_file(file), file, true);
	else if (needs & NET && file)
		read_origins(file);
}

/*
 * Check options and open all files first, so that mistakes are found before
 * any request; then send the requests that every step needs.
 */
static void
prepare(const struct command *c, char **arg)
{
	int needs = c->needs & ONLY_NET_WITH_K && opt['K'] ? NET :
	    c->needs;

	apply_options();
	start_clock();
	check_local(c, needs, arg);
	read_records(needs);
	start_clock();
	open_output(c, true);
	if (boxed)
		open_box(option('B'), true);
	if (!(needs & NET))
		return;
	choose_directory();
	if (!boxed)
		check_proxy(order.directory);
	write_early(known_lines());
	acme_start();
	if (needs & ACCOUNT_URL)
		need_account();
}

/*
 * Forbid core files, which would contain keys. The user's programs that
 * the step runs get back the limit that they would have had.
 */
static void
limit_core(void)
{
	struct rlimit zero;

	if (getrlimit(RLIMIT_CORE, &core_limit) != 0)
		die(FAULT, "cannot forbid core files: %", why());
	zero = core_limit;
	zero.rlim_cur = 0;
	if (prlimit(0, RLIMIT_CORE, &zero, NULL) != 0)
		die(FAULT, "cannot forbid core files: %", why());
}

static void run(int, char **) __attribute__((noinline));

/* Run the step, not in main's frame: wipe_and_exit() stops below that. */
static void
run(int argc, char **argv)
{
	const struct command *c;
	char **arg;

	if (argc < 2)
		no_command();
	c = find_command(usual_name(argv[1]));
	step = str(c->name);
	on_record_pipe = c->needs & RECORD_OUT;
	arg = read_options(c, argv + 2);
	check_usage(c, arg);
	prepare(c, arg);
	c->run(arg);
	conn_close();
}

int
main(int argc, char **argv)
{
	unsigned char here;

	stack_end = &here;
	protect_relocated();
	hold_descriptors();
	limit_core();
	conn.fd = -1;
	wipe_at_end(&account_key, sizeof account_key);
	wipe_at_end(&other_key, sizeof other_key);
	wipe_at_end(&reader, sizeof reader);
	wipe_at_end(&conn, sizeof conn);
	wipe_at_end(&tls, sizeof tls);
	on_record_pipe = true;
	catch_signals();
	run(argc, argv);
	leave(DONE);
}
