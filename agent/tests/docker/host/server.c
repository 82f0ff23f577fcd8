/* A server small enough to be made into an image on the spot. `serve PORT` answers every HTTP request with 200 and the value of
   GREETING; `exit CODE` ends with a last word; `stubborn` ignores SIGTERM by having no handler and being PID 1's only child;
   `reach ADDRESS PORT` tells by its exit code whether a connection can be made. */
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
            dprintf(peer, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %zu\r\n\r\n%s", strlen(greeting), greeting);
        close(peer);
    }
}

static int reach(const char *address, int port) {
    struct timeval patience = {.tv_sec = 2};
    int peer = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, address, &at.sin_addr);
    setsockopt(peer, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    return connect(peer, (struct sockaddr *)&at, sizeof at) ? 7 : 0;
}

int main(int count, char **words) {
    if (count == 3 && !strcmp(words[1], "serve")) return serve(atoi(words[2]));
    if (count == 4 && !strcmp(words[1], "reach")) return reach(words[2], atoi(words[3]));
    if (count == 3 && !strcmp(words[1], "exit")) {
        fprintf(stderr, "these are my last words\n");
        return atoi(words[2]);
    }
    for (;;) pause();
}
