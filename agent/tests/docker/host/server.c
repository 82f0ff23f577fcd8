/* A server small enough to be made into an image on the spot. `serve PORT` answers every HTTP request with 200 and the value of
   GREETING; `exit CODE` ends with a last word; `stubborn` ignores SIGTERM by having no handler and being PID 1's only child;
   `reach ADDRESS PORT` tells by its exit code whether a connection can be made; `ask ADDRESS PORT TEXT` writes TEXT, with \r\n for every |,
   on one and prints what comes back; `mcp PORT` is an MCP server with one tool until it gets SIGUSR1, and then accepts and never answers;
   `lines` is one on its standard input and output; `brief MILLISECONDS` ends without an error after that; `resolve NAME` asks Docker's resolver and prints the address, or its exit code tells why not. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static int serve(int port) {
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {INADDR_ANY}};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 16)) return 1;
    signal(SIGPIPE, SIG_IGN);
    const char *greeting = getenv("GREETING") ? getenv("GREETING") : "hello";
    printf("serving on %d\n", port);
    fprintf(stderr, "this is stderr\n");
    fflush(stdout);
    for (;;) {
        char buffer[4096];
        int peer = accept(listener, 0, 0);
        if (peer < 0) continue;
        if (read(peer, buffer, sizeof buffer) > 0)
            dprintf(peer, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/plain\r\ncontent-length: %zu\r\n\r\n%s", strlen(greeting), greeting);
        close(peer);
    }
}

static volatile sig_atomic_t hanging;

static void hang(int signal) {
    (void)signal;
    hanging = 1;
}

/* One request, its body's beginning or an empty text. */
static const char *request(int peer, char *buffer, size_t size) {
    size_t length = 0;
    for (;;) {
        ssize_t got = read(peer, buffer + length, size - 1 - length);
        if (got <= 0) return "";
        buffer[length += got] = 0;
        char *end = strstr(buffer, "\r\n\r\n"), *said = strcasestr(buffer, "content-length:");
        if (!end) continue;
        size_t body = said && said < end ? strtoul(said + 15, 0, 10) : 0;
        if (length >= (size_t)(end + 4 - buffer) + body) return end + 4;
    }
}

static int mcp(int port) {
    static char buffer[65536];
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {INADDR_ANY}};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 64)) return 1;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGUSR1, hang);
    for (;;) {
        int peer = accept(listener, 0, 0);
        if (peer < 0 || hanging) continue;
        const char *body = request(peer, buffer, sizeof buffer), *id = strstr(body, "\"id\":");
        const char *result = 0, *status = "202 Accepted";
        char answer[512] = "";
        if (strstr(body, "\"initialize\""))
            result = "{\"protocolVersion\":\"2025-06-18\",\"capabilities\":{\"tools\":{}},\"serverInfo\":{\"name\":\"small\",\"version\":\"1\"}}";
        if (strstr(body, "\"tools/list\"")) result = "{\"tools\":[{\"name\":\"add\",\"inputSchema\":{\"type\":\"object\"}}]}";
        if (result && id) {
            status = "200 OK";
            snprintf(answer, sizeof answer, "{\"jsonrpc\":\"2.0\",\"id\":%ld,\"result\":%s}", strtol(id + 5, 0, 10), result);
        }
        dprintf(peer, "HTTP/1.1 %s\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", status,
                strlen(answer), answer);
        close(peer);
    }
}

static int lines(void) {
    static char line[65536];
    while (fgets(line, sizeof line, stdin)) {
        const char *id = strstr(line, "\"id\":"), *result = "{}";
        if (strstr(line, "\"initialize\""))
            result = "{\"protocolVersion\":\"2025-06-18\",\"capabilities\":{},\"serverInfo\":{\"name\":\"small\",\"version\":\"1\"}}";
        if (id) printf("{\"jsonrpc\":\"2.0\",\"id\":%ld,\"result\":%s}\n", strtol(id + 5, 0, 10), result);
        fflush(stdout);
    }
    return 0;
}

static int reach(const char *address, int port) {
    struct timeval patience = {.tv_sec = 2};
    int peer = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, address, &at.sin_addr);
    setsockopt(peer, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    return connect(peer, (struct sockaddr *)&at, sizeof at) ? 7 : 0;
}

static int ask(const char *address, int port, const char *text) {
    struct timeval patience = {.tv_sec = 5};
    int peer = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, address, &at.sin_addr);
    setsockopt(peer, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(peer, (struct sockaddr *)&at, sizeof at)) return 7;
    for (; *text; text++) {
        int sent = *text == '|' ? write(peer, "\r\n", 2) : write(peer, text, 1);
        if (sent < 0) return 8;
    }
    char buffer[4096];
    for (ssize_t got; (got = read(peer, buffer, sizeof buffer)) > 0;) fwrite(buffer, 1, got, stdout);
    return 0;
}

static int resolve(const char *name) {
    unsigned char packet[512] = {0x12, 0x34, 1, 0, 0, 1};
    size_t length = 12;
    while (*name) {
        size_t label = strcspn(name, ".");
        packet[length++] = label;
        memcpy(packet + length, name, label);
        length += label;
        name += label + (name[label] == '.');
    }
    memcpy(packet + length, "\0\0\1\0\1", 5);
    length += 5;
    struct timeval patience = {.tv_sec = 5};
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(53)};
    inet_pton(AF_INET, "127.0.0.11", &at.sin_addr);
    int peer = socket(AF_INET, SOCK_DGRAM, 0);
    setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (sendto(peer, packet, length, 0, (struct sockaddr *)&at, sizeof at) < 0) return 7;
    unsigned char answer[512];
    ssize_t got = read(peer, answer, sizeof answer);
    if (got < 12) return 9;
    if ((answer[3] & 15) || !(answer[6] | answer[7])) return 8;
    /* The last four bytes of an answer with one address in it. */
    printf("%d.%d.%d.%d\n", answer[got - 4], answer[got - 3], answer[got - 2], answer[got - 1]);
    return 0;
}

int main(int count, char **words) {
    if (count == 3 && !strcmp(words[1], "serve")) return serve(atoi(words[2]));
    if (count == 3 && !strcmp(words[1], "mcp")) return mcp(atoi(words[2]));
    if (count == 2 && !strcmp(words[1], "lines")) return lines();
    if (count == 3 && !strcmp(words[1], "brief")) {
        usleep(atoi(words[2]) * 1000);
        fprintf(stderr, "these are my last words\n");
        return 0;
    }
    if (count == 4 && !strcmp(words[1], "reach")) return reach(words[2], atoi(words[3]));
    if (count == 5 && !strcmp(words[1], "ask")) return ask(words[2], atoi(words[3]), words[4]);
    if (count == 3 && !strcmp(words[1], "resolve")) return resolve(words[2]);
    if (count == 3 && !strcmp(words[1], "exit")) {
        fprintf(stderr, "these are my last words\n");
        return atoi(words[2]);
    }
    for (;;) pause();
}
