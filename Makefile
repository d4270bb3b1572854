# acme-step: the README's part BUILDING says what can be set here.
.POSIX:
.SUFFIXES:

PREFIX   = /usr/local
BINDIR   = $(PREFIX)/bin
DOCDIR   = $(PREFIX)/share/doc/acme-step

# What only the static binary wants.  Debian's archive of BearSSL was made
# with glibc: --defsym gives its checked functions the plain ones of musl.
# Nothing unwinds the stack: SCRIPT, which the linker reads from its
# standard input, drops 12 KB of tables for that.  Nothing relocates it
# either: musl's static start leaves RELRO alone, which costs a page.  Six
# of GCC's optimizations make the code bigger, though -Oz has them on.
CC       = musl-gcc
CFLAGS   = -Oz
LDFLAGS  = -static -fno-pie -no-pie -Wl,-T,/dev/stdin \
           -Wl,-z,norelro,-z,noseparate-code \
           -fno-inline-functions-called-once -fno-expensive-optimizations \
           -fno-caller-saves -fno-if-conversion -fno-jump-tables \
           -fno-tree-tail-merge \
           -Wl,--defsym=__memcpy_chk=memcpy \
           -Wl,--defsym=__memset_chk=memset \
           -Wl,--defsym=__memmove_chk=memmove
SCRIPT   = SECTIONS { /DISCARD/ : { *(.eh_frame .comment) } } \
           INSERT AFTER .rodata;

# A source tree of BearSSL, built with $(CC), in place of the system's.
BEARSSL  =

WARN     = -Wall -Wextra -Wpedantic -Wshadow -Wconversion \
           -Wno-sign-conversion -Wstrict-prototypes -Wmissing-prototypes \
           -Wwrite-strings -Wvla -Wformat=2 -Wundef
HARDEN   = -s -fstack-protector -ffunction-sections -fdata-sections \
           -Wl,-z,relro,-z,now,-z,noexecstack,--gc-sections,--build-id=none
SAN      = -g -fsanitize=address,undefined -fno-sanitize-recover=all

# $$inc and $$lib: where BearSSL's headers and archive are.
FIND     = set -e; if [ "$(BEARSSL)" ]; then \
		inc='$(BEARSSL)/inc' lib='$(BEARSSL)/build/libbearssl.a'; \
		[ -f "$$lib" ] || $(MAKE) -C '$(BEARSSL)' lib \
		    CC='$(CC)' LD='$(CC)'; \
	else \
		inc=/usr/include/bearssl; \
		for lib in /usr/lib/`$(CC) -print-multiarch`/libbearssl.a \
		    /usr/lib/libbearssl.a; do \
			[ ! -f "$$lib" ] || break; \
		done; \
	fi
COMPILE  = -std=c99 $(WARN) -isystem "$$inc" $(CFLAGS)

all: acme-step

acme-step: acme.c Makefile
	@$(FIND); set -x; \
	echo '$(SCRIPT)' | $(CC) $(COMPILE) $(HARDEN) $(LDFLAGS) \
	    -o $@ acme.c "$$lib"

acme-step-san: acme.c Makefile
	@$(FIND); set -x; \
	cc $(COMPILE) -O1 $(SAN) -o $@ acme.c "$$lib"

deps:
	@sh ./test.sh deps

demo: deps
	@$(MAKE) acme-step
	@sh ./test.sh demo

check: deps
	@$(MAKE) acme-step
	@sh ./test.sh

check-san: deps
	@$(MAKE) acme-step-san
	@sh ./test.sh check ./acme-step-san

check-cross:
	@sh ./test.sh cross

check-initramfs: deps
	@$(MAKE) acme-step
	@sh ./test.sh initramfs

bench: deps
	@$(MAKE) acme-step
	@sh ./test.sh bench

image: acme-step.tar

acme-step.tar: acme-step test.sh
	sh ./test.sh image acme-step $@

install: acme-step
	mkdir -p '$(DESTDIR)$(BINDIR)' '$(DESTDIR)$(DOCDIR)'
	cp acme-step '$(DESTDIR)$(BINDIR)/'
	cp README LICENSE '$(DESTDIR)$(DOCDIR)/'

uninstall:
	rm -f '$(DESTDIR)$(BINDIR)/acme-step'
	rm -rf '$(DESTDIR)$(DOCDIR)'

clean:
	rm -rf acme-step acme-step-san acme-step.tar .cache

.PHONY: all deps demo check check-san check-cross check-initramfs bench \
        image install uninstall clean
